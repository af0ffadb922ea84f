"""The trackers that a run reports to, in process 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Tracking:
    """Trackers of the accelerate library, of which there may be none."""

    def __init__(self, trackers: Sequence[Any] = ()) -> None:
        self.trackers = trackers

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Report figures of a step by name."""
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)


@contextmanager
def tracking(names: Sequence[str], logs: Path, settings: Mapping[str, Any]) -> Iterator[Tracking]:
    """Report to trackers until the `with` block ends.

    Args:
        names: As a recipe has them.
        logs: The directory of those that write files, which stays.
        settings: Of the run, by name.
    """
    if not names:
        yield Tracking()
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    PartialState()  # which its trackers ask for the main process
    made: list[Any] = []
    for name in filter_trackers([*names], str(logs)):
        kind = LOGGER_TYPE_TO_CLASS[str(name)]
        where = [str(logs)] if kind.requires_logging_directory else []
        made.append(tracker := kind("lorafold", *where))
        tracker.start()
        tracker.store_init_configuration({k: str(v) for k, v in settings.items()})
    try:
        yield Tracking(made)
    finally:
        for tracker in made:
            tracker.finish()
