"""The comparison to look at: a table on the terminal, in Markdown, and a page that needs nothing beside itself."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lorafold.compare.measure import Row


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def figure(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda r: r.method,
    "trainable": lambda r: f"{r.trainable_parameters:,}",
    "share": lambda r: f"{r.trainable_share:.3%}",
    "adapter MB": lambda r: f"{r.adapter_bytes / 1e6:.2f}",
    "tokens/s": lambda r: f"{r.tokens_per_second:,.0f}",
    "peak GB": lambda r: f"{r.peak_bytes / 1e9:.2f}",
    "loss": lambda r: f"{r.loss:.4f}",
    "exact": lambda r: share(r.exact_match),
    "forgetting KL": lambda r: figure(r.forgetting_kl, ".4f"),
    "outside loss": lambda r: figure(r.forgetting_loss, "+.4f"),
    "decode ×": lambda r: figure(r.latency_attached),
    "prefill ×": lambda r: figure(r.prefill_attached),
    "merged decode ×": lambda r: figure(r.latency_merged),
    "merged prefill ×": lambda r: figure(r.prefill_merged),
    "mergeable": lambda r: "yes" if r.mergeable else "no",
    "new modules": lambda r: "yes" if r.modifies_architecture else "no",
}


def table(rows: Sequence[Row]) -> Table:
    shown = Table(*COLUMNS)
    for row in rows:
        shown.add_row(*(cell(row) for cell in COLUMNS.values()))
    return shown


def markdown(rows: Sequence[Row]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the table and its plots as one HTML file."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(row))}</td>" for cell in COLUMNS.values()) + "</tr>" for row in rows)
    names, losses = [r.method for r in rows], [r.loss for r in rows]
    plots = [scatter("Quality against parameters", "trainable parameters", [float(r.trainable_parameters) for r in rows], losses, names)]
    forgotten = [max(r.forgetting_kl, 1e-6) for r in rows if r.forgetting_kl is not None]
    if len(forgotten) == len(rows):
        across = "forgotten: KL to the base on text outside the task, nats a token"
        plots.append(scatter("Learned against forgotten", across, forgotten, losses, names))
    for what, attached, merged in (
        ("Decode", [r.latency_attached for r in rows], [r.latency_merged for r in rows]),
        ("Prefill", [r.prefill_attached for r in rows], [r.prefill_merged for r in rows]),
    ):
        if any(attached):
            plots.append(bars(f"{what} latency over the base's", names, attached, merged))
    path.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; position: sticky; left: 0; background: #fff; }} svg {{ max-width: 100%; height: auto; }}
</style>
<h1>{html.escape(title)}</h1>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{"".join(plots)}
</html>
""", encoding="utf-8")  # fmt: skip


def drawing(draw: Callable, title: str) -> str:
    """An SVG drawn by `draw(axes)`, to stand in a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    plot = Figure(figsize=(9, 4.5), layout="constrained")
    axes = plot.add_subplot()
    axes.set_title(title)
    draw(axes)
    text = io.StringIO()
    FigureCanvasSVG(plot).print_svg(text)
    _, tag, rest = text.getvalue().partition("<svg")
    return f"<figure>{tag}{rest}</figure>"


def scatter(title: str, across: str, x: Sequence[float], losses: Sequence[float], names: Sequence[str]) -> str:
    def draw(axes: Any) -> None:
        axes.scatter(x, losses)
        axes.set(xlabel=across, ylabel="held-out loss (lower is better)", xscale="log", yscale="log")
        for name, at in zip(names, zip(x, losses, strict=True), strict=True):
            axes.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8)

    return drawing(draw, title)


def bars(title: str, names: Sequence[str], attached: Sequence[float | None], merged: Sequence[float | None]) -> str:
    def draw(axes: Any) -> None:
        for shift, label, values in ((-0.2, "attached", attached), (0.2, "merged", merged)):
            axes.bar([i + shift for i in range(len(names))], [value or 0 for value in values], 0.4, label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.legend()

    return drawing(draw, title)
