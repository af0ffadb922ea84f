"""The report of a comparison: a table of the main figures for the terminal, all figures in
Markdown, and an HTML page with plots. Figures of several seeds are shown as the mean (lowest to
highest); empty columns are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafold.comparing.measure import BASE, Measurement, Measurements
from lorafold.comparing.paired_tests import (
    MIN_SEEDS,
    Difference,
    by_name,
    held_out,
    lower_is_better,
    over_base,
    verdict,
)
from lorafold.evaluation.intervals import Interval
from lorafold.files import plots
from lorafold.files.html_page import ShownInNotebooks, markdown_table, render_page, write_page
from lorafold.files.plots import tick_label, truncate_distinct
from lorafold.files.terminal import MISSING, mean_of, mean_range, paragraph, text_table, values_of

Table = tuple[list[str], list[list[str]]]  # headings, lines
MIN_X = 1e-6  # value on a logarithmic axis
INTERVALS = "Lines are 95% intervals."


@dataclass(frozen=True)
class Quality:
    label: str
    values: list[float | None]
    intervals: list[Interval | None]
    base: float | None = None
    lower: bool = True

    @classmethod
    def of(cls, measurements: Measurements) -> Quality:
        lower, differences = lower_is_better(measurements), held_out(measurements)
        methods, figure = by_name(measurements), LOSS if lower else REWARD
        base = mean_of(values_of(methods.pop(BASE, ()), figure))
        intervals = [differences[name].interval for name in methods]
        label = f"held-out {figure} ({'lower' if lower else 'higher'} is better)"
        return cls(label, means(methods.values(), figure), intervals, base, lower)

    @property
    def scale(self) -> str:
        """The scale of the axis: logarithmic for losses that differ by more than a factor of 5 and
        have intervals above 0.
        """
        known = [v for v in (*self.values, self.base) if v is not None]
        lows = [interval[0] for interval in self.intervals if interval]
        return "log" if self.lower and 0 < 5 * min([*known, *lows]) < max(known) else "linear"

    @property
    def order(self) -> list[int]:
        known = [n for n, value in enumerate(self.values) if value is not None]
        return sorted(known, key=lambda n: self.values[n] or 0, reverse=not self.lower)


class Cost(NamedTuple):
    figure: str
    name: str
    axis: str
    words: str
    least: str


COSTS = (
    Cost(
        "trainable_parameters", "parameters", "trained parameters", "trains {} parameters",
        "trains the fewest",
    ),
    Cost(
        "forgetting_kl", "forgetting", "KL to the base on other text, nats per token",
        "forgets {} nats per token", "forgets the least",
    ),
)  # fmt: skip


def means(methods: Iterable[Measurements], figure: str) -> list[float | None]:
    return [mean_of(values_of(seeds, figure)) for seeds in methods]


def plots_of(measurements: Measurements) -> Iterator[str]:
    methods, quality = by_name(measurements), Quality.of(measurements)
    methods.pop(BASE, None)
    if not methods:
        return
    names, figures = [*methods], methods.values()
    mergeable = [all(values_of(seeds, "mergeable")) for seeds in figures]
    yield ranking(quality, names)
    for cost in COSTS:
        x = [mean if mean is None else max(mean, MIN_X) for mean in means(figures, cost.figure)]
        if None not in x:
            yield scatter(cost, x, quality, names, mergeable)
    for phase, figure in (("Decode", "latency"), ("Prefill", "prefill")):
        by_way = {way: means(figures, f"{figure}_{way}") for way in ("attached", "merged")}
        if any(by_way["attached"]):
            yield latencies(f"{phase} latency, relative to the base model", names, by_way)


def ranking(quality: Quality, names: Sequence[str]) -> str:
    order, intervals_of = quality.order, quality.intervals
    labels = truncate_distinct([names[n] for n in order], 16)
    shown = [f"{name}  {quality.values[n]:.4g}" for name, n in zip(labels, order, strict=True)]

    def draw(axes: Any) -> None:
        values, intervals = [quality.values[n] for n in order], [intervals_of[n] for n in order]
        plots.draw_rows(axes, shown, [plots.Series("", values, intervals)], max(map(len, shown)))
        if quality.base is not None:
            plots.draw_level(axes, "base", x=quality.base)
        axes.set_xlabel(quality.label, loc="right")  # long names leave little room
        plots.set_scales(axes, x=quality.scale)

    ends = dict.fromkeys(f"{names[n]} at {quality.values[n]:.4g}" for n in (order[0], order[-1]))
    base = "" if quality.base is None else f", the base at {quality.base:.4g}"
    caption = f"{' to '.join(ends)}{base}. {INTERVALS}"
    return plots.figure_html(draw, "Quality", caption, plots.rows_size(shown))


def scatter(
    cost: Cost,
    x: Sequence[float | None],
    quality: Quality,
    names: Sequence[str],
    mergeable: Sequence[bool],
) -> str:
    known = quality.order
    best, least = known[0], min(known, key=lambda n: x[n] or 0)

    def draw(axes: Any) -> str:
        for n in known:
            y, style = quality.values[n], plots.series_style(0 if mergeable[n] else 1)
            interval = plots.error_bars([y or 0], [quality.intervals[n]])
            axes.errorbar(x[n], y, yerr=interval, elinewidth=0.8, **style | {"linestyle": "none"})
        if quality.base is not None:
            plots.draw_level(axes, "base", y=quality.base)
        axes.set(xlabel=cost.axis, ylabel=quality.label)
        plots.set_scales(axes, x="log", y=quality.scale)
        points = [(x[n], quality.values[n]) for n in known]
        return plots.label_points(axes, points, [names[n] for n in known])

    def cost_of(n: int) -> str:
        return plots.tick_label(x[n] or 0, digits=3)

    extreme = "lowest loss" if quality.lower else "highest reward"
    caption = f"{names[best]}, which has the {extreme}, {cost.words.format(cost_of(best))}"
    if best != least:
        caption += (
            f"; {names[least]} {cost.least}, {cost_of(least)}, and has {quality.values[least]:.4g}"
        )
    merged = "Methods with triangles can't be merged. " if not all(mergeable) else ""
    title = f"Quality against {cost.name}"
    return plots.figure_html(draw, title, f"{caption}. {merged}{INTERVALS}", (plots.SIZE[0], 3.4))


def latencies(title: str, names: Sequence[str], by_way: dict[str, list[float | None]]) -> str:
    series = [
        plots.Series(name, values, [None] * len(values))
        for name, values in by_way.items()
        if any(value is not None for value in values)
    ]

    def draw(axes: Any) -> str:
        plots.draw_level(axes, "base", x=1)
        axes.set(xlabel="ratio to the base")
        left_out = plots.draw_rows(axes, names, series)
        plots.set_scales(axes, x="linear")
        return left_out

    def describe(line: plots.Series) -> str:
        known = sorted((v, n) for v, n in zip(line.values, names, strict=True) if v is not None)
        (low, fast), (high, slow) = known[0], known[-1]
        between = f"{low:.2f} ({fast}) to {high:.2f} ({slow})" if len(known) > 1 else f"{low:.2f}"
        return f"{line.name} {between}"

    caption = f"Ratios: {'; '.join(map(describe, series))}. Lower is faster."
    return plots.figure_html(draw, title, caption, plots.rows_size(names, len(series)))


LOSS, EXACT, REWARD, OVER_BASE = "loss", "exact", "reward", "over base"
INTERVAL_SUFFIX = " 95%"  # suffix of the heading of an interval
COLUMNS = {  # heading: figure, format
    "trainable": ("trainable_parameters", ",.0f"),
    "share": ("trainable_share", ".3%"),
    "adapter MB": ("adapter_megabytes", ".2f"),
    "seconds": ("train_seconds", ",.0f"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "peak GB": ("peak_gigabytes", ".2f"),
    LOSS: (LOSS, ".4f"),
    EXACT: ("exact_match", ".1%"),
    REWARD: (REWARD, ".4g"),
    "tokens a completion": ("tokens_a_completion", ".1f"),
    "cut off": ("cut_off", ".1%"),
    "forgetting KL": ("forgetting_kl", ".3f"),
    "outside loss": ("forgetting_loss", "+.3f"),
    "decode ×": ("latency_attached", ".2f"),
    "prefill ×": ("prefill_attached", ".2f"),
    "merged decode ×": ("latency_merged", ".2f"),
    "merged prefill ×": ("prefill_merged", ".2f"),
}
FLAGS = {"mergeable": "mergeable", "new modules": "modifies_architecture"}  # heading: figure


def figures(measurements: Measurements) -> Table:
    methods, gains = by_name(measurements), over_base(measurements)
    columns, names = {"method": [*methods]}, list(measurements[0].rewards)

    def column(figure: str, fmt: str) -> list[str]:
        return [mean_range(values_of(seeds, figure), fmt) for seeds in methods.values()]

    def intervals(bounds: Iterable[Interval | None], fmt: str) -> list[str]:
        return [f"{one[0]:{fmt}} to {one[1]:{fmt}}" if one else MISSING for one in bounds]

    for heading, (figure, fmt) in COLUMNS.items():
        columns[heading] = column(figure, fmt)
        if heading == (LOSS if lower_is_better(measurements) else REWARD):
            every = (one.interval for one in held_out(measurements).values())
            columns[heading + INTERVAL_SUFFIX] = intervals(every, fmt)
            columns["validation"] = column("validation", fmt)
            columns[OVER_BASE] = [str(gains.get(name, MISSING)) for name in methods]
            columns |= {
                f"reward {name}": [
                    mean_range((r.rewards[name] for r in runs), ".4g") for runs in methods.values()
                ]
                for name in names
                if len(names) > 1
            }
        if heading == EXACT:
            # of a single seed; several seeds are shown as a range
            seeds = methods.values()
            single = (of[0].exact_match_interval if len(of) == 1 else None for of in seeds)
            columns[EXACT + INTERVAL_SUFFIX] = intervals(single, ".1%")
    for heading, figure in FLAGS.items():
        columns[heading] = [answer(values_of(seeds, figure)) for seeds in methods.values()]
    return table_of(columns)


def table_of(columns: dict[str, list[str]]) -> Table:
    known = {heading: cells for heading, cells in columns.items() if {*cells} != {MISSING}}
    return [*known], [list(line) for line in zip(*known.values(), strict=True)]


def answer(values: Sequence[bool | None]) -> str:
    return MISSING if None in values else "yes" if all(values) else "no"


SHORT_COLUMNS = {  # heading: figure, format; besides loss or reward
    EXACT: ("exact_match", ".0%"),
    "KL to base": ("forgetting_kl", ".3f"),
    "peak GB": ("peak_gigabytes", ".2f"),
    "time s": ("train_seconds", ",.0f"),
}


def short_report(measurements: Measurements) -> str:
    """The main figures in a table of at most 80 columns, a legend, and the verdict."""
    methods, lower = by_name(measurements), lower_is_better(measurements)
    gains, qualities = over_base(measurements), held_out(measurements).values()
    heading, fmt = (LOSS, ".4f") if lower else (REWARD, ".4g")
    columns = {
        "method": [*methods],
        heading: [plus_minus(one, fmt) for one in qualities],
        OVER_BASE: [
            plus_minus(gains[name], f"+{fmt}") if name in gains else MISSING for name in methods
        ],
        **{
            heading: [mean_range(values_of(of, figure), fmt, False) for of in methods.values()]
            for heading, (figure, fmt) in SHORT_COLUMNS.items()
        },
        "trained": [
            MISSING if (n := seeds[0].trainable_parameters) is None else tick_label(n, digits=3)
            for seeds in methods.values()
        ],
    }
    several = max(map(len, methods.values()))
    means = f" Means over {several} seeds." if several > 1 else ""
    over = "and seeds" if several >= MIN_SEEDS else "only, not seeds"
    about = f"{LOSS_NOTE if lower else REWARD_NOTE} {over}.{means} {LEGEND}"
    conclusion = verdict(measurements)
    below = [*paragraph(about), *(["", *paragraph(f"{conclusion}.")] if conclusion else [])]
    return text_table(*table_of(columns)) + "\n" + "\n".join(below)


LOSS_NOTE = "loss: in nats per token, with its 95% interval; lower is better. Intervals cover rows"
REWARD_NOTE = "reward: with its 95% interval; higher is better. Intervals cover prompts"
LEGEND = (
    "over base: paired difference from the base model. KL to base: forgetting, on text outside"
    " the task, in nats per token; lower is better. time: training. trained: parameters. --wide"
    " prints all figures."
)


def plus_minus(difference: Difference, fmt: str) -> str:
    """A figure with half the width of its symmetric interval, as in 0.52 ±0.03."""
    if difference.interval is None:
        return f"{difference.mean:{fmt}}"
    half = (difference.interval[1] - difference.interval[0]) / 2
    return f"{difference.mean:{fmt}} ±{half:{fmt.lstrip('+')}}"


def markdown(measurements: Measurements) -> str:
    below = f"\n{conclusion}\n" if (conclusion := verdict(measurements)) else ""
    return markdown_table(*figures(measurements)) + below


def page(measurements: Measurements, title: str, path: Path) -> None:
    (head, lines), conclusion = figures(measurements), verdict(measurements)
    content = render_page(
        "comparing/compare.html",
        verdict=f"{conclusion}." if conclusion else "",
        plots=plots_of(measurements),
        head=head,
        lines=lines,
        rewards=measurements[0].reward is not None,
    )
    write_page(title, content, path)


@dataclass(frozen=True)
class Comparison(ShownInNotebooks):
    """The measurements of every method, setting and seed; the base comes first."""

    rows: tuple[Measurement, ...]
    model: str
    source: str

    @property
    def over_base(self) -> dict[str, Difference]:
        """The paired difference of each method's loss or reward from the base, by
        `Measurement.name`.
        """
        return over_base(self.rows)

    @property
    def verdict(self) -> str:
        """Which method is best or, if the differences are not significant, which methods can't be
        distinguished.
        """
        return verdict(self.rows)

    def as_json(self) -> dict[str, Any]:
        """All figures under the keys of `lorafold compare --json`, except the losses of rows."""
        gains = {method: asdict(one) for method, one in self.over_base.items()}
        rows = [asdict(one) for one in self.rows]
        for row in rows:
            del row["row_losses"]  # one for each held-out row; OUT/rows.json has them
        return {"rows": rows, "over_base": gains, "verdict": self.verdict}

    def __str__(self) -> str:
        return markdown(self.rows)
