"""What a path is told that was given as an adapter and is none."""

from pathlib import Path

from lorafold.errors import LorafoldError, listed
from lorafold.files.paths import beside
from lorafold.peft.config import CONFIG


def no_adapter(path: Path) -> LorafoldError:
    """The error for a path without an adapter's configuration: what is there instead, and what to
    give.
    """
    if path.is_file():
        own = (path.parent / CONFIG).is_file()
        told = f"; it is a file, and its directory is {path.parent}" if own else "; it is a file"
    elif not path.exists():
        told = "; there is none on this machine" + beside(path)
    elif inside := sorted(str(p.parent) for p in path.glob(f"*/{CONFIG}")):
        told = f"; there is one in {listed(inside)}"
    elif (path / "config.json").is_file():
        told = f"; it is a model, which is given as --model {path}"
    else:
        told = ""
    return LorafoldError(f"{path}: found no {CONFIG}, expected the directory of an adapter{told}")
