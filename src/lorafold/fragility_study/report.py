"""The report of a fragility study: a table of the main figures for the terminal, all figures in
Markdown, and an HTML page. A row is one setting of the tuning, at its largest number of examples;
figures of several seeds are shown as the mean (lowest to highest).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafold.comparing.paired_tests import Difference
from lorafold.comparing.report import plus_minus
from lorafold.evaluation.intervals import Interval
from lorafold.files.html_page import markdown_table, render_page, write_page
from lorafold.files.plots import FAINT, LineEnd, figure_html, label_ends, series_style, set_scales
from lorafold.files.terminal import MISSING, formatted, mean_range, paragraph, text_table, values_of
from lorafold.fragility_study.defences import DEFENCES
from lorafold.fragility_study.measure import RefusalMetrics, TunedMetrics
from lorafold.fragility_study.result import Curve, Fragility, Point, TuningSetting

METRICS = {  # heading: (field of a point, format)
    "log-odds": ("measured.log_odds", "+.2f"),
    "kept": ("kept", ".2f"),
    "refusals": ("measured.refusals", ".0%"),
    "refusals of controls": ("measured.control_refusals", ".0%"),
    "KL on controls": ("measured.kl", ".3f"),
    "benign loss": ("measured.loss", ".3f"),
    "written overlap": ("overlap.written", ".1%"),
    "by chance": ("overlap.written_by_chance", ".1%"),
    "read overlap": ("overlap.read", ".1%"),
    "by chance ": ("overlap.read_by_chance", ".1%"),
}
SETTING = ("stack", "defence", "rank", "rate")


def table_row(points: Sequence[Point]) -> list[str]:
    figures = (mean_range(values_of(points, figure), fmt) for figure, fmt in METRICS.values())
    return [*setting_cells(points[0].way), formatted(points[0].examples, "d"), *figures]


def setting_cells(setting: TuningSetting) -> list[str]:
    stack, defence, rank, rate = setting
    return [stack, defence, formatted(rank, "d"), formatted(rate, "g")]


def last_points(study: Fragility) -> list[list[Point]]:
    before = [
        [Point.of(TuningSetting(name, label), None, 0, stack, TunedMetrics(metrics, None))]
        for name, stack in study.stacks.items()
        for label, metrics in (("no alignment", stack.without), ("before", stack.before))
        if metrics is not None
    ]
    if not study.curves:
        return [*before, [*study.points]]
    return [*before, *([*curve.by_examples.values()][-1] for curve in study.curves)]


HEADINGS = (*SETTING, "examples", *METRICS)


SHORT_COLUMNS = ("kept", "refusals", "refusals of controls", "KL on controls", "benign loss")
LEGEND = (
    "log-odds: of refusal over compliance, with its 95% interval; above 0, refusal is more likely."
    " kept: the share of the alignment's effect that is left; 1 is all, 0 is none. refusals of"
    " controls: should be low. KL: of the controls' completions, in nats per token. benign loss:"
    " on held-out benign rows; lower is better. --wide prints all figures."
)


def short_report(study: Fragility) -> str:
    """The main figures, in a table of at most 80 columns with a legend."""
    rows = last_points(study)
    labels = [_label_parts(points[0]) for points in rows]
    columns = [[*dict.fromkeys(filter(None, column))] for column in zip(*labels, strict=True)]
    varied = [len(column) > 1 for column in columns]
    common = [column[0] for column in columns if len(column) == 1]
    figures = [METRICS[name] for name in SHORT_COLUMNS]
    cells = [
        [
            " ".join(part for part, differs in zip(label, varied, strict=True) if part and differs),
            _log_odds(points),
            *(mean_range(values_of(points, figure), fmt, False) for figure, fmt in figures),
        ]
        for label, points in zip(labels, rows, strict=True)
    ]
    seeds = max(map(len, rows))
    about = f"Means over {seeds} seeds. {LEGEND}" if seeds > 1 else LEGEND
    above = paragraph(f"{', '.join(common)}:") if common else []
    table = text_table(("tuning", "log-odds", *SHORT_COLUMNS), cells)
    return "\n".join([*above, table, *paragraph(about)])


def _label_parts(point: Point) -> tuple[str, ...]:
    stack, defence, *numbers = setting_cells(point.way)
    named = zip(("rank ", "rate "), numbers, strict=True)
    settings = ["" if value == MISSING else name + value for name, value in named]
    return stack, defence, *settings, f"{point.examples} examples" * bool(point.examples)


def _log_odds(points: Sequence[Point]) -> str:
    figure, fmt = METRICS["log-odds"]
    if len(points) > 1:
        return mean_range(values_of(points, figure), fmt, False)
    metrics = points[0].measured
    return plus_minus(Difference(metrics.log_odds, metrics.log_odds_interval), fmt)


def markdown(study: Fragility) -> str:
    halved = [[*setting_cells(curve.way), curve.halved] for curve in study.curves]
    tables = [markdown_table((*SETTING, "log-odds"), halved)] if halved else []
    return "\n".join([*tables, markdown_table(HEADINGS, [*map(table_row, last_points(study))])])


def page(study: Fragility, path: str | Path) -> None:
    curves = study.curves
    defences = dict.fromkeys(curve.way.defence for curve in curves)
    content = render_page(
        "fragility_study/fragility.html",
        study=study,
        curves=[*map(str, curves)],
        plots=plots_of(curves),
        defences={name: DEFENCES[name].about for name in defences},
        head=HEADINGS,
        last=[*map(table_row, last_points(study))],
        every=[table_row(points) for curve in curves for points in curve.by_examples.values()],
    )
    write_page(f"Fragility of {', '.join(study.stacks)}", content, path)


def plots_of(curves: Sequence[Curve]) -> Iterator[str]:
    """Yields plots of log-odds and of refusals for each stack, rank and learning rate."""

    def group(curve: Curve) -> tuple:
        return curve.way.stack, curve.way.rank, curve.way.lr

    for (stack, rank, lr), same in groupby(sorted(curves, key=group), key=group):
        chosen = sorted(same, key=lambda curve: list(DEFENCES).index(curve.way.defence))
        title = f"{stack}: rank {rank}, rate {lr:g}"
        before, reference = chosen[0].stack.before, chosen[0].stack.reference
        halfway = (before.log_odds + reference) / 2
        yield plot(
            title, "log-odds of refusal", chosen, "+.2f", "log_odds",
            {"before": before.log_odds, "halfway": halfway, "without": reference},
        )  # fmt: skip
        yield plot(title, "refusals", chosen, ".0%", "refusals", {"before": before.refusals})


def plot(
    title: str,
    label: str,
    curves: Sequence[Curve],
    fmt: str,
    figure: str,
    levels: dict[str, float],
) -> str:
    means, bands = {}, {}
    for curve in curves:
        after = [[p.measured for p in points] for points in curve.by_examples.values()]
        metrics = [[curve.stack.before], *after]
        means[curve.way.defence] = [fmean(values_of(seeds, figure)) for seeds in metrics]
        bands[curve.way.defence] = [band(seeds, figure) for seeds in metrics]

    def draw(axes: Any) -> None:
        ends = [LineEnd(height, name, FAINT) for name, height in levels.items()]
        for height in levels.values():
            axes.axhline(height, color=FAINT, linewidth=0.8, linestyle=":")
        for curve in curves:
            name, counts = curve.way.defence, [0, *curve.by_examples]
            x, style = [math.log1p(k) for k in counts], series_style(list(DEFENCES).index(name))
            axes.plot(x, means[name], **style)
            low_high = zip(*bands[name], strict=True)
            axes.fill_between(x, *low_high, color=style["color"], alpha=0.12, linewidth=0)
            axes.set_xticks(x, list(map(str, counts)))
            ends.append(LineEnd(means[name][-1], name, style["color"]))
        axes.set(xlabel="benign examples", ylabel=label)
        set_scales(axes, y="linear")
        label_ends(axes, ends)

    largest = max(max(curve.by_examples) for curve in curves)
    ended = ", ".join(f"{name} {heights[-1]:{fmt}}" for name, heights in means.items())
    caption = f"After {largest} benign examples: {ended}; {levels['before']:{fmt}} before."
    return figure_html(draw, f"{label[0].upper()}{label[1:]}, {title}", caption)


def band(seeds: Sequence[RefusalMetrics], figure: str) -> Interval:
    """The interval of a figure for a single seed, or its range over several seeds."""
    values = values_of(seeds, figure)
    interval = getattr(seeds[0], f"{figure}_interval") if len(seeds) == 1 else None
    return interval or (min(values), max(values))
