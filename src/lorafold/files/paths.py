"""Paths: the cache, suggestions for misspelled names, and checks of output paths."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from lorafold.errors import LorafoldError

MIN_SIMILARITY = 0.8
MAX_ENTRIES = 2000  # entries of a directory that are compared


def cache_directory() -> Path:
    """Returns LORAFOLD_CACHE, or `lorafold` in the user's cache directory."""
    if own := os.environ.get("LORAFOLD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorafold"


def nearest_name(path: Path) -> str:
    """Returns a message with the most similar path in the same directory, or ""."""
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), MAX_ENTRIES)]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, 1, MIN_SIMILARITY)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def check_name(out: str | Path) -> None:
    if Path(out).name in ("", ".."):
        raise LorafoldError(f"{out}: expected the name of a new directory")


def check_not_replaced(out: str | Path, read: Iterable[str | Path]) -> None:
    """Raises if the output directory contains an input, which writing would delete."""
    target = Path(out).expanduser().resolve()
    for path in read:
        if Path(path).expanduser().resolve().is_relative_to(target):
            raise LorafoldError(
                f"--out {out}: would overwrite {path}, which is read; choose another directory"
            )
