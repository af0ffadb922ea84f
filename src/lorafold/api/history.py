"""`lf.history`: what the run that wrote an adapter has shown, step by step."""

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api import options as opt

if TYPE_CHECKING:
    from lorafold.inspecting.history import History


@opt.verb
def history(adapter: opt.Adapter, *, html: str | Path | None = None) -> "History":
    """Show the run that wrote an adapter: its figures by step, held-out figures, completions.

    All of it is in the adapter's record: no model is opened. Of a policy there are the reward and
    each reward, how long completions are, how many are cut off, entropy, KL and mismatch, the
    completions of the first and of the last measure, and what is to be looked at. Of other
    objectives there are their losses and held-out figures.

    Args:
        html: Also write curves and completions as one HTML file.

    Raises LorafoldError where there is no record of a run.

    Examples:
        lorafold history demo/adapter
        lorafold history demo/adapter --html history.html
        lorafold history demo/adapter --json
    """
    from lorafold.api.arguments import as_page, as_path
    from lorafold.inspecting.history import read_history
    from lorafold.inspecting.history_page import page

    place = as_page(html)
    found = read_history(as_path(adapter, "adapter"))
    if place is not None:
        page(found, place)
    return found
