"""`lorafold history`: what the run that wrote an adapter has shown, step by step."""

from pathlib import Path
from typing import Annotated

from lorafold.cli.common import Adapters, JsonOption, emit
from lorafold.cli.groups import grouped
from lorafold.cli.pages import page_option

EXAMPLES = (
    "lorafold history demo/adapter",
    "lorafold history demo/adapter --html history.html",
    "lorafold history demo/adapter --json",
)


@grouped
def command(
    adapters: Adapters,
    html: Annotated[
        Path | None, page_option("Also write curves and completions as one HTML file.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the run that wrote an adapter: its figures by step, held-out figures, completions.

    All of it is in the adapter's record: no model is opened. Of a policy there are the reward and
    each reward, how long completions are, how many are cut off, entropy, KL and mismatch, the
    completions of the first and of the last measure, and what is to be looked at. Of other
    objectives there are their losses and held-out figures.
    """
    from lorafold.api.history import history
    from lorafold.inspecting.history_page import page

    found = history(adapters.one)
    if html:
        page(found, html)
    emit(json, found.as_json(), str(found))
