"""Figures that take long to measure: each is kept in a file of its own as soon as it is there.

    found = kept(out / f"lora-0-{digest_of(task)}.json", lambda: measure(task))

The name of a file has a digest of everything that the figures depend on, so the same call continues
what was stopped, and another task measures anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafold.files.atomic import write_json
from lorafold.files.record import read_object

DIGITS = 12


def kept(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures in a file or, if there is no such file, those that `measure` gives, once they are
    written there.
    """
    if not file.is_file():
        write_json(file, measure())
    return read_object(file)


def digest_of(value: Any) -> str:
    """The first digits of the SHA-256 of a value that is written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
