"""`lorafold.json`, the record beside an adapter or a trained model: how it was made, from what, and
on which base. Directories that PEFT wrote have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafold.errors import LorafoldError, both_names

RECORD = "lorafold.json"
BASE = "base"  # the fingerprint of the base that an adapter is for
TRAINED_ON = "trained_on"  # the base in training: {"storage": "nf4", "dtype": "bf16"}
OTHER_BASE = "other_base"  # says that an adapter was loaded on another base, and which
RENAMED = {"base": "storage"}  # fields of recipes; files may use the old names for good
ALIASES = {"quantization": "storage"}  # other names of fields and options, which stay
NAMES = RENAMED | ALIASES


def named_as_now(fields: Mapping[str, Any], names: Mapping[str, str] = NAMES) -> dict[str, Any]:
    """The fields under their names of today. LorafoldError for a field that has two names."""
    for name, now in names.items():
        same = [n for n in (now, *names) if n != name and n in fields and names.get(n, n) == now]
        if name in fields and same:
            raise LorafoldError(both_names(name, same[0]))
    return {names.get(name, name): value for name, value in fields.items()}
