"""What a result must not replace: that which it is made of."""

from collections.abc import Iterable
from pathlib import Path

from lorafold.errors import LorafoldError


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
