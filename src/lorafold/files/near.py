"""What stands beside a path that is not there, under a name that is nearly its own."""

from difflib import get_close_matches
from itertools import islice
from pathlib import Path

ALIKE = 0.8
MOST = 2000  # entries of a directory that are compared


def beside(path: Path) -> str:
    """A question, after a semicolon, for the entry of the same directory whose name is nearest;
    empty where none is near.
    """
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), MOST)]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, 1, ALIKE)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
