"""The report of a fragility study: a table of the main figures for the terminal, all figures in
Markdown, and an HTML page. A row is one kind of tuning, at its largest number of examples; figures
of several seeds are shown as the mean (lowest to highest).
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
from lorafold.robustness.defences import DEFENCES
from lorafold.robustness.measure import After, State
from lorafold.robustness.result import Curve, Fragility, Point, Way

FIGURES = {  # heading: figure of a point, format
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
WAY = ("stack", "defence", "rank", "rate")


def line(points: Sequence[Point]) -> list[str]:
    figures = (mean_range(values_of(points, figure), form) for figure, form in FIGURES.values())
    return [*ids(points[0].way), formatted(points[0].examples, "d"), *figures]


def ids(way: Way) -> list[str]:
    return [way.stack, way.defence, formatted(way.rank, "d"), formatted(way.lr, "g")]


def last_points(study: Fragility) -> list[list[Point]]:
    before = [
        [Point.of(Way(name, what, None, None), None, 0, stack, After(state, None))]
        for name, stack in study.stacks.items()
        for what, state in (("no alignment", stack.without), ("before", stack.before))
        if state is not None
    ]
    if not study.curves:
        return [*before, [*study.points]]
    return [*before, *([*curve.by_examples.values()][-1] for curve in study.curves)]


HEAD = (*WAY, "examples", *FIGURES)


SHORT = ("kept", "refusals", "refusals of controls", "KL on controls", "benign loss")
LEGEND = (
    "log-odds: of refusal over compliance, with its 95% interval; above 0, refusal is more likely."
    " kept: the share of the alignment's effect that is left; 1 is all, 0 is none. refusals of"
    " controls: should be low. KL: of the controls' completions, in nats per token. benign loss:"
    " on held-out benign rows; lower is better. --wide prints all figures."
)


def deciding(study: Fragility) -> str:
    """The main figures, in a table of at most 80 columns with a legend."""
    every = last_points(study)
    ways = [_parts(points[0]) for points in every]
    parts = [[*dict.fromkeys(filter(None, of))] for of in zip(*ways, strict=True)]
    varied = [len(of) > 1 for of in parts]
    common = [of[0] for of in parts if len(of) == 1]
    figures = [FIGURES[name] for name in SHORT]
    cells = [
        [
            " ".join(part for part, differs in zip(way, varied, strict=True) if part and differs),
            _log_odds(points),
            *(mean_range(values_of(points, figure), form, False) for figure, form in figures),
        ]
        for way, points in zip(ways, every, strict=True)
    ]
    seeds = max(map(len, every))
    about = f"Means over {seeds} seeds. {LEGEND}" if seeds > 1 else LEGEND
    above = paragraph(f"{', '.join(common)}:") if common else []
    return "\n".join([*above, text_table(("tuning", "log-odds", *SHORT), cells), *paragraph(about)])


def _parts(one: Point) -> tuple[str, ...]:
    stack, defence, *numbers = ids(one.way)
    named = zip(("rank ", "rate "), numbers, strict=True)
    settings = ["" if value == MISSING else what + value for what, value in named]
    return stack, defence, *settings, f"{one.examples} examples" * bool(one.examples)


def _log_odds(points: Sequence[Point]) -> str:
    figure, form = FIGURES["log-odds"]
    if len(points) > 1:
        return mean_range(values_of(points, figure), form, False)
    one = points[0].measured
    return plus_minus(Difference(one.log_odds, one.log_odds_interval), form)


def markdown(study: Fragility) -> str:
    halved = [[*ids(curve.way), curve.halved] for curve in study.curves]
    tables = [markdown_table((*WAY, "log-odds"), halved)] if halved else []
    return "\n".join([*tables, markdown_table(HEAD, [*map(line, last_points(study))])])


def page(study: Fragility, path: str | Path) -> None:
    curves = study.curves
    used = dict.fromkeys(curve.way.defence for curve in curves)
    content = render_page(
        "robustness/fragility.html",
        found=study,
        curves=[*map(str, curves)],
        plots=drawings(curves),
        defences={name: DEFENCES[name].about for name in used},
        head=HEAD,
        last=[*map(line, last_points(study))],
        every=[line(points) for curve in curves for points in curve.by_examples.values()],
    )
    write_page(f"Fragility of {', '.join(study.stacks)}", content, path)


def drawings(curves: Sequence[Curve]) -> Iterator[str]:
    """Yield two plots for each stack, rank and rate: log-odds and refusals, with one line per
    defence.
    """

    def together(curve: Curve) -> tuple:
        return curve.way.stack, curve.way.rank, curve.way.lr

    for (stack, rank, lr), of in groupby(sorted(curves, key=together), key=together):
        chosen = sorted(of, key=lambda curve: list(DEFENCES).index(curve.way.defence))
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
    form: str,
    figure: str,
    levels: dict[str, float],
) -> str:
    means, bands = {}, {}
    for curve in curves:
        after = [[p.measured for p in points] for points in curve.by_examples.values()]
        states = [[curve.stack.before], *after]
        means[curve.way.defence] = [fmean(values_of(seeds, figure)) for seeds in states]
        bands[curve.way.defence] = [band(seeds, figure) for seeds in states]

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

    most = max(max(curve.by_examples) for curve in curves)
    ended = ", ".join(f"{name} {heights[-1]:{form}}" for name, heights in means.items())
    caption = f"After {most} benign examples: {ended}; {levels['before']:{form}} before."
    return figure_html(draw, f"{label[0].upper()}{label[1:]}, {title}", caption)


def band(seeds: Sequence[State], figure: str) -> Interval:
    """The interval of a figure for a single seed, or the range over several."""
    values = values_of(seeds, figure)
    own = getattr(seeds[0], f"{figure}_interval") if len(seeds) == 1 else None
    return own or (min(values), max(values))
