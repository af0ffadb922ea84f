"""Paths: the cache, the nearest name to a missing one, and checks of where to write."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from lorafold.errors import LorafoldError

ALIKE = 0.8
MOST = 2000  # entries of a directory that are compared


def cache_directory() -> Path:
    """The directory for files that lorafold can make again: LORAFOLD_CACHE, or `lorafold` in the
    user's cache directory.
    """
    if own := os.environ.get("LORAFOLD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorafold"


def nearest_name(path: Path) -> str:
    """A question, after a semicolon, for the entry of the directory with the nearest name, or "".
    """
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), MOST)]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, 1, ALIKE)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def check_name(out: str | Path) -> None:
    """Raise LorafoldError for a path without a name of its own, such as the working directory."""
    if Path(out).name in ("", ".."):
        raise LorafoldError(f"{out}: expected the name of a new directory")


def check_not_replaced(out: str | Path, read: Iterable[str | Path]) -> None:
    """Raise LorafoldError if writing a directory would replace one that is read."""
    target = Path(out).expanduser().resolve()
    for path in read:
        if Path(path).expanduser().resolve().is_relative_to(target):
            raise LorafoldError(
                f"--out {out}: it would replace {path}, which is read; expected another directory"
            )
