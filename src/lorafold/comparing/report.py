"""The comparison as a table for the terminal, as Markdown, and as an HTML page with plots that
needs no other file.

Each method has one line. Figures of several seeds are shown as the mean (lowest to highest).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from lorafold.comparing.measure import Measurement
from lorafold.files.page import document, drawing, html_table, markdown_table

COLUMNS: dict[str, tuple[Callable[[Measurement], float | None], str]] = {  # heading: value, format
    "trainable": (lambda r: r.trainable_parameters, ",.0f"),
    "share": (lambda r: r.trainable_share, ".3%"),
    "adapter MB": (lambda r: r.adapter_bytes / 1e6, ".2f"),
    "tokens/s": (lambda r: r.tokens_per_second, ",.0f"),
    "peak GB": (lambda r: r.peak_bytes / 1e9, ".2f"),
    "loss": (lambda r: r.loss, ".4f"),
    "exact": (lambda r: r.exact_match, ".1%"),
    "forgetting KL": (lambda r: r.forgetting_kl, ".3f"),
    "outside loss": (lambda r: r.forgetting_loss, "+.3f"),
    "decode ×": (lambda r: r.latency_attached, ".2f"),
    "prefill ×": (lambda r: r.prefill_attached, ".2f"),
    "merged decode ×": (lambda r: r.latency_merged, ".2f"),
    "merged prefill ×": (lambda r: r.prefill_merged, ".2f"),
}
FLAGS: dict[str, Callable[[Measurement], bool]] = {
    "mergeable": lambda r: r.mergeable,
    "new modules": lambda r: r.modifies_architecture,
}
HEADINGS = ("method", *COLUMNS, *FLAGS)


def by_method(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """The figures of each method, over its seeds."""
    return [list(seeds) for _, seeds in groupby(measurements, lambda one: one.method)]


def lines(measurements: Sequence[Measurement]) -> list[list[str]]:
    """The cells under HEADINGS, with one line for each method."""
    return [
        [
            seeds[0].method,
            *(cell([value(r) for r in seeds], form) for value, form in COLUMNS.values()),
            *("yes" if all(map(flag, seeds)) else "no" for flag in FLAGS.values()),
        ]
        for seeds in by_method(measurements)
    ]


def cell(values: Sequence[float | None], form: str) -> str:
    """The mean of formatted values, with their range if they differ; a dash without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    lowest, mean, highest = (f"{value:{form}}" for value in (min(known), fmean(known), max(known)))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def table(measurements: Sequence[Measurement]) -> Table:
    """The table for the terminal."""
    shown = Table(*HEADINGS)
    for line in lines(measurements):
        shown.add_row(*line)
    return shown


def markdown(measurements: Sequence[Measurement]) -> str:
    """The table in Markdown."""
    return markdown_table(HEADINGS, lines(measurements))


ABOUT = """Every method was trained on the same rows, with the same model and number of steps, and
with its own learning rates. Loss and exact match are measured on held-out rows. Forgetting is
measured on text outside the task, in nats a token: the KL divergence from the base, and the
increase of the loss. Latencies at batch 1 are ratios to those of the base, with all models timed in
turn. A method is mergeable if the folded model had the same logits. New modules remain in the
forward pass."""


def page(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Write the table and its plots as one HTML file.

    Args:
        measurements: In the order of the methods.
        title: The title of the page.
        path: The file to write.
    """

    def means(value: Callable[[Measurement], float | None]) -> list[float | None]:
        return [
            fmean(known) if (known := [v for r in seeds if (v := value(r)) is not None]) else None
            for seeds in by_method(measurements)
        ]

    names, mergeable = (
        [seeds[0].method for seeds in by_method(measurements)],
        [all(r.mergeable for r in seeds) for seeds in by_method(measurements)],
    )
    loss, forgotten = (
        means(lambda r: r.loss),
        means(lambda r: None if r.forgetting_kl is None else max(r.forgetting_kl, 1e-6)),
    )
    plots = [
        scatter(
            "Quality against parameters",
            "trainable parameters",
            means(lambda r: r.trainable_parameters),
            loss,
            names,
            mergeable,
        )
    ]
    if None not in forgotten:
        across = "forgetting: KL from the base on text outside the task, nats a token"
        plots.append(
            scatter("Quality against forgetting", across, forgotten, loss, names, mergeable)
        )
    for what, attached, merged in (
        ("Decode", means(lambda r: r.latency_attached), means(lambda r: r.latency_merged)),
        ("Prefill", means(lambda r: r.prefill_attached), means(lambda r: r.prefill_merged)),
    ):
        if any(attached):
            plots.append(bars(f"{what} latency, relative to the base", names, attached, merged))
    table = html_table(HEADINGS, lines(measurements))
    document(title, f"<p>{ABOUT}</p>\n{table}\n{''.join(plots)}", path)


def scatter(
    title: str,
    across: str,
    x: Sequence[float | None],
    loss: Sequence[float | None],
    names: Sequence[str],
    mergeable: Sequence[bool],
) -> str:
    """A plot of the held-out loss over another figure, with the methods' names.

    Args:
        across: The label of the other figure.
        x: The other figure of each method.
        loss: The held-out loss of each method.
        names: The names of the methods.
        mergeable: Whether each method is mergeable, which chooses its marker.
    """

    def draw(axes: Any) -> None:
        for wanted, marker, label in ((True, "o", "mergeable"), (False, "^", "not mergeable")):
            if chosen := [i for i, merges in enumerate(mergeable) if merges is wanted]:
                axes.scatter(
                    [x[i] for i in chosen], [loss[i] for i in chosen], marker=marker, label=label
                )
        axes.set(
            xlabel=across, ylabel="held-out loss (lower is better)", xscale="log", yscale="log"
        )
        axes.legend()
        for name, x_at, y_at, shift in zip(names, x, loss, shifts(x, loss), strict=True):
            line = {"arrowstyle": "-", "linewidth": 0.4}
            axes.annotate(
                name,
                (x_at, y_at),
                xytext=(6, 3 + shift),
                textcoords="offset points",
                fontsize=8,
                arrowprops=line,
            )

    return drawing(draw, title)


def shifts(x: Sequence[float | None], y: Sequence[float | None]) -> list[float]:
    """How many points each label must move up so that none covers another, on two logarithmic axes
    of about 550 by 250 points.
    """

    def spread(values: Sequence[float | None], length: float) -> list[float]:
        logs = [math.log(value or 1) for value in values]
        return [length * (v - min(logs)) / ((max(logs) - min(logs)) or 1) for v in logs]

    across, up = spread(x, 550), spread(y, 250)
    taken: list[tuple[float, float]] = []
    found = dict.fromkeys(range(len(up)), 0.0)
    for i in sorted(found, key=lambda i: up[i]):
        while any(abs(across[i] - a) < 50 and abs(up[i] + found[i] - b) < 9 for a, b in taken):
            found[i] += 3
        taken.append((across[i], up[i] + found[i]))
    return list(found.values())


def bars(
    title: str,
    names: Sequence[str],
    attached: Sequence[float | None],
    merged: Sequence[float | None],
) -> str:
    """A bar chart of the attached and the merged model, relative to the base.

    Args:
        names: The names of the methods.
        attached, merged: The ratios of each method; None has no bar.
    """

    def draw(axes: Any) -> None:
        for shift, label, values in ((-0.2, "attached", attached), (0.2, "merged", merged)):
            axes.bar(
                [i + shift for i in range(len(names))],
                [value or 0 for value in values],
                0.4,
                label=label,
            )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.legend()

    return drawing(draw, title)
