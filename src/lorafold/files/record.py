"""`lorafold.json`, the record beside an adapter or a trained model: how it was made, and on what.

Absent in PEFT's own directories.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.files.intact import check_intact

RECORD = "lorafold.json"


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. LorafoldError if it is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LorafoldError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def read_record(directory: str | Path) -> dict[str, Any]:
    """The record of a directory, empty where there is none.

    LorafoldError for one that can't be read, or is not the one that was written.
    """
    check_intact(directory, [RECORD])
    path = Path(directory) / RECORD
    return read_object(path) if path.is_file() else {}


def base_trained_on(adapters: Sequence[str | Path]) -> str | None:
    """The word for how the base was held while these adapters were trained, as their recipes have
    it; None where no record says.

    LorafoldError where they differ.
    """
    found = {
        str(path): str(recipe["base"])
        for path in adapters
        if "base" in (recipe := read_record(path).get("recipe") or {})
    }
    if len(set(found.values())) > 1:
        held = ", ".join(f"{path} on {base}" for path, base in found.items())
        raise LorafoldError(
            f"these adapters were trained on bases that are held differently ({held}): say which"
            " to use"
        )
    return next(iter(found.values()), None)
