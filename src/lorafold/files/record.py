"""`lorafold.json`, the record beside an adapter or a trained model: how it was made, from what, and
on which base.

Directories that PEFT wrote have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.files.intact import check_intact
from lorafold.files.renamed import named_as_now

RECORD = "lorafold.json"


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises LorafoldError if it is not a JSON object."""
    return as_object(path.read_bytes(), path)


def as_object(content: bytes | bytearray, path: Path) -> dict[str, Any]:
    """The content of a JSON file, as `read_object`; `path` is for the message."""
    try:
        value = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise LorafoldError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def read_record(directory: str | Path) -> dict[str, Any]:
    """The record in a directory; empty if there is none.

    Raises LorafoldError if it can't be read, or was changed since it was written.
    """
    check_intact(directory, [RECORD])
    path = Path(directory) / RECORD
    return read_object(path) if path.is_file() else {}


def base_trained_on(adapters: Sequence[str | Path]) -> str | None:
    """The storage of the base on which these adapters were trained, from the recipes in their
    records; None if no record has it.

    Raises LorafoldError if the adapters differ in it.
    """
    found = {
        str(path): str(recipe["storage"])
        for path in adapters
        if "storage" in (recipe := named_as_now(read_record(path).get("recipe") or {}))
    }
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{path} on {base}" for path, base in found.items())
        raise LorafoldError(
            f"these adapters were trained on bases in different storage ({listed}); choose one of"
            " them (--storage)"
        )
    return next(iter(found.values()), None)
