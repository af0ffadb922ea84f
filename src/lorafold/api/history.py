"""`lf.history`: metrics and completions of the run that wrote an adapter."""

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api import options as opt

if TYPE_CHECKING:
    from lorafold.inspecting.history import History


@opt.verb
def history(adapter: opt.Adapter, *, html: str | Path | None = None) -> "History":
    """Show the run that wrote an adapter: metrics by step, held-out metrics and completions.

    Everything comes from the adapter's record, so no model is loaded. For a policy, it shows the
    total reward and each reward, completion lengths, the share of truncated completions, entropy,
    KL, sampler/trainer log-probability difference, the completions of the first and the last
    evaluation, and warnings. For other objectives, it shows the losses and held-out metrics.

    Args:
        html: Also write curves and completions to one HTML file.

    Raises LorafoldError if there is no record of a run.

    Examples:
        lorafold history demo/adapter
        lorafold history demo/adapter --html history.html
        lorafold history demo/adapter --json
    """
    from lorafold.api.arguments import as_html_path, as_path
    from lorafold.inspecting.history import read_history
    from lorafold.inspecting.history_page import page

    html_path = as_html_path(html)
    result = read_history(as_path(adapter, "adapter"))
    if html_path is not None:
        page(result, html_path)
    return result
