"""Where a result can't go: in the place of what it is made of, and where no name is given to it."""

from collections.abc import Iterable
from pathlib import Path

from lorafold.errors import LorafoldError


def check_name(out: str | Path) -> None:
    """Raise LorafoldError for a path without a name of its own, such as the working directory."""
    if Path(out).name in ("", ".."):
        raise LorafoldError(f"{out}: expected the name of a new directory")


def check_kept(out: str | Path, read: Iterable[str | Path]) -> None:
    """Raise LorafoldError if a directory that is written takes the place of one that is read, or
    has it inside.
    """
    target = Path(out).expanduser().resolve()
    for path in read:
        if Path(path).expanduser().resolve().is_relative_to(target):
            raise LorafoldError(
                f"--out {out}: it would replace {path}, which is read; expected another directory"
            )
