"""The trackers of a recipe: accelerate takes them by name, and leaves out in silence those whose
package is not installed.
"""

from collections.abc import Sequence
from difflib import get_close_matches

from lorafold.errors import LorafoldError

ALL = "all"  # accelerate's name for those that are installed
PACKAGES = {"comet_ml": "comet-ml"}  # of those that are not called as the tracker is


def check_trackers(names: Sequence[str]) -> None:
    """Raise LorafoldError for a name that is no tracker's, with the nearest ones, and for a tracker
    that is not installed, with its package. Call it before any work is done.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [*map(str, LOGGER_TYPE_TO_CLASS)]
    for name in names:
        if name not in (*known, ALL):
            near = get_close_matches(name.lower(), known, n=1) or sorted(known)
            raise LorafoldError(f"trackers: found {name!r:.80}, expected {' or '.join(near)}")
        if name != ALL and name not in map(str, get_available_trackers()):
            package = PACKAGES.get(name, name)
            raise LorafoldError(
                f"trackers: {name} is not installed; pip install {package}, or leave it out"
            )
