"""`lorafold.json`, the record beside an adapter or a trained model: how it was made, from what, and
on which base.

Directories that PEFT wrote have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafold.errors import LorafoldError, both_names

RECORD = "lorafold.json"
BASE = "base"  # the fingerprint of the base that an adapter is for
TRAINED_ON = "trained_on"  # the base in training: {"storage": "nf4", "dtype": "bf16"}
OTHER_BASE = "other_base"  # says that an adapter was loaded on another base, and which
RENAMED = {"base": "storage"}  # fields of recipes; files are read under the old names for good


def named_as_now(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that any version wrote, under the names that they have now. Raises
    LorafoldError for one that has both names.
    """
    for old, now in RENAMED.items():
        if old in recipe and now in recipe:
            raise LorafoldError(both_names(old, now))
    return {RENAMED.get(name, name): value for name, value in recipe.items()}
