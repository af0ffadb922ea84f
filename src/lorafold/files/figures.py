"""Figures that take long to measure: each is kept in a file of its own as soon as it is there.

    found = kept({out / f"lora-0-{digest_of(task)}.json": lambda: measure(task)})

The name of a file has a digest of everything that the figures depend on, so the same call continues
what was stopped, another task measures anew, and calls in several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lorafold.files.atomic import write_json
from lorafold.files.claims import shared, silent
from lorafold.files.record import read_object

DIGITS = 12
Figures = dict[str, Any]


def kept(
    measures: Mapping[Path, Callable[[], Figures]],
    done: Callable[[Path, Figures], object] = lambda file, found: None,
    say: Callable[[str], object] = silent,
) -> list[Figures]:
    """The figures in each file, in this order; those that are not there are measured first, by this
    process or by another that is asked for the same.

    Args:
        measures: What gives the figures of each file.
        done: Called with each file and its figures, once they are there.
        say: Is told for whom this process waits.
    """
    work = {file: partial(_write, file, measure) for file, measure in measures.items()}
    shared(work, lambda file: done(file, read_object(file)), say)
    return [read_object(file) for file in measures]


def _write(file: Path, measure: Callable[[], Figures]) -> None:
    write_json(file, measure())


def digest_of(value: Any) -> str:
    """The first digits of the SHA-256 of a value that is written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
