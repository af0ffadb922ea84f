"""`lorafold.json`, the record beside an adapter or a trained model: how it was made, from what, and
on which base.

Directories that PEFT wrote have none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError, both_names

RECORD = "lorafold.json"
BASE = "base"  # the fingerprint of the base that an adapter is for
TRAINED_ON = "trained_on"  # the base in training: {"storage": "nf4", "dtype": "bf16"}
OTHER_BASE = "other_base"  # says that an adapter was loaded on another base, and which
RENAMED = {"base": "storage"}  # fields of recipes; files are read under the old names for good


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises LorafoldError if it is not a JSON object."""
    return as_object(path.read_bytes(), path)


def as_object(content: bytes | bytearray, path: Path) -> dict[str, Any]:
    """The content of a JSON file, as `read_object`; `path` is for the message."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LorafoldError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def named_as_now(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that any version wrote, under the names that they have now. Raises
    LorafoldError for one that has both names.
    """
    for old, now in RENAMED.items():
        if old in recipe and now in recipe:
            raise LorafoldError(both_names(old, now))
    return {RENAMED.get(name, name): value for name, value in recipe.items()}
