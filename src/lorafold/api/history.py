"""`lf.history`: what the run that wrote an adapter has shown, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import as_path

if TYPE_CHECKING:
    from lorafold.inspecting.history import History


def history(adapter: str | Path) -> History:
    """The figures of a finished run by step, held-out figures with their intervals, completions to
    read, and what is to be looked at. No model is opened.

    Args:
        adapter: The directory that `lf.train` wrote, of an adapter or of a whole model.

    Raises LorafoldError where there is no record of a run.
    """
    from lorafold.inspecting.history import read_history

    return read_history(as_path(adapter, "adapter"))
