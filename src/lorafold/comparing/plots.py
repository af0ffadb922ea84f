"""The plots of a comparison: the quality of each method, against what it costs, and latencies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from lorafold.comparing.measure import BASE, Measurement
from lorafold.comparing.paired import by_method, held_out, lower_is_better
from lorafold.evaluation.intervals import Interval
from lorafold.files import plots
from lorafold.files.plots import distinct

SMALLEST = 1e-6  # of what a logarithmic axis shows
INTERVALS = "Lines are 95% intervals."


@dataclass(frozen=True)
class Quality:
    """What methods are compared by: the value of each with its interval, and the base's."""

    label: str
    values: list[float | None]
    intervals: list[Interval | None]
    base: float | None = None
    lower: bool = True

    @classmethod
    def of(cls, measurements: Sequence[Measurement]) -> Quality:
        """The held-out loss or reward."""
        methods = tuned(measurements)
        shared = held_out(measurements)
        intervals = [shared[seeds[0].name].interval for seeds in methods]
        bare = [[r for r in measurements if r.method == BASE]]
        if lower_is_better(measurements):
            label, [before] = "held-out loss (lower is better)", means(bare, lambda r: r.loss)
            return cls(label, means(methods, lambda r: r.loss), intervals, before)
        [before] = means(bare, lambda r: r.reward)
        label = "held-out reward (higher is better)"
        return cls(label, means(methods, lambda r: r.reward), intervals, before, False)

    @property
    def scale(self) -> str:
        """That of its axis: logarithmic for losses far apart, whose intervals are above 0."""
        known = [v for v in (*self.values, self.base) if v is not None]
        lows = [interval[0] for interval in self.intervals if interval]
        apart = 0 < 5 * min([*known, *lows]) < max(known)
        return "log" if self.lower and apart else "linear"

    @property
    def order(self) -> list[int]:
        """The numbers of the methods, the best first."""
        known = [n for n, value in enumerate(self.values) if value is not None]
        return sorted(known, key=lambda n: self.values[n] or 0, reverse=not self.lower)


class Cost(NamedTuple):
    """What quality is shown against: its name, its axis, and how it and its least are told."""

    name: str
    axis: str
    told: str
    least: str


COSTS: dict[Cost, Callable[[Measurement], float | None]] = {
    Cost(
        "parameters", "trained parameters", "trains {} parameters", "trains the fewest"
    ): lambda r: r.trainable_parameters,
    Cost(
        "forgetting",
        "KL from the base on other text, nats a token",
        "forgets {} nats a token",
        "forgets the least",
    ): lambda r: None if r.forgetting_kl is None else max(r.forgetting_kl, SMALLEST),
}


def tuned(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """The figures of each method but the base."""
    return [seeds for seeds in by_method(measurements) if seeds[0].method != BASE]


def means(
    methods: Sequence[Sequence[Measurement]], value: Callable[[Measurement], float | None]
) -> list[float | None]:
    """The mean of a figure over the seeds of each method; None where it has none."""
    known = [[v for r in seeds if (v := value(r)) is not None] for seeds in methods]
    return [fmean(values) if values else None for values in known]


def plots_of(measurements: Sequence[Measurement]) -> Iterator[str]:
    """The plots, as HTML figures."""
    methods = tuned(measurements)
    if not methods:
        return
    quality = Quality.of(measurements)
    names = [seeds[0].name for seeds in methods]
    mergeable = [all(r.mergeable for r in seeds) for seeds in methods]
    yield ranking(quality, names)
    for cost, value in COSTS.items():
        x = means(methods, value)
        if None not in x:
            yield scatter(cost, x, quality, names, mergeable)
    for what, attached, merged in (
        ("Decode", lambda r: r.latency_attached, lambda r: r.latency_merged),
        ("Prefill", lambda r: r.prefill_attached, lambda r: r.prefill_merged),
    ):
        both = {"attached": means(methods, attached), "merged": means(methods, merged)}
        if any(both["attached"]):
            yield latencies(f"{what} latency, as a ratio to the base's", names, both)


def ranking(quality: Quality, names: Sequence[str]) -> str:
    """The quality of each method with its interval, the best above."""
    order, reach = quality.order, quality.intervals
    told = distinct([names[n] for n in order], 16)
    shown = [f"{name}  {quality.values[n]:.4g}" for name, n in zip(told, order, strict=True)]

    def draw(axes: Any) -> None:
        values, intervals = [quality.values[n] for n in order], [reach[n] for n in order]
        plots.rows(axes, shown, [plots.Marks("", values, intervals)], max(map(len, shown)))
        if quality.base is not None:
            plots.level(axes, "base", x=quality.base)
        axes.set_xlabel(quality.label, loc="right")  # beside long names there is little room
        plots.scaled(axes, x=quality.scale)

    ends = dict.fromkeys(f"{names[n]} at {quality.values[n]:.4g}" for n in (order[0], order[-1]))
    said = " to ".join(ends) + ("" if quality.base is None else f", the base at {quality.base:.4g}")
    return plots.drawing(draw, "Quality", f"{said}. {INTERVALS}", plots.height_of(shown))


def scatter(
    cost: Cost,
    x: Sequence[float | None],
    quality: Quality,
    names: Sequence[str],
    mergeable: Sequence[bool],
) -> str:
    """A plot of the quality over a cost, `x` of each method, whose marker says whether it is
    mergeable.
    """
    known = quality.order
    best, least = known[0], min(known, key=lambda n: x[n] or 0)

    def draw(axes: Any) -> str:
        for n in known:
            y, style = quality.values[n], plots.series(0 if mergeable[n] else 1)
            reach = plots.spread([y or 0], [quality.intervals[n]])
            axes.errorbar(x[n], y, yerr=reach, elinewidth=0.8, **style | {"linestyle": "none"})
        if quality.base is not None:
            plots.level(axes, "base", y=quality.base)
        axes.set(xlabel=cost.axis, ylabel=quality.label)
        plots.scaled(axes, x="log", y=quality.scale)
        points = [(x[n], quality.values[n]) for n in known]
        return plots.at_points(axes, points, [names[n] for n in known])

    def of(n: int) -> str:
        return plots.number(x[n] or 0, digits=3)

    extreme = "lowest loss" if quality.lower else "highest reward"
    said = f"{names[best]}, which has the {extreme}, {cost.told.format(of(best))}"
    if best != least:
        said += f"; {names[least]} {cost.least}, {of(least)}, and has {quality.values[least]:.4g}"
    merged = "Triangles can't be merged. " if not all(mergeable) else ""
    title = f"Quality against {cost.name}"
    return plots.drawing(draw, title, f"{said}. {merged}{INTERVALS}", (plots.SIZE[0], 3.4))


def latencies(title: str, names: Sequence[str], both: dict[str, list[float | None]]) -> str:
    """A plot of the attached and the merged model: `both` has the ratios of each method by these
    names.
    """
    marks = [
        plots.Marks(name, values, [None] * len(values))
        for name, values in both.items()
        if any(value is not None for value in values)
    ]

    def draw(axes: Any) -> str:
        plots.level(axes, "base", x=1)
        axes.set(xlabel="times the base's")
        left_out = plots.rows(axes, names, marks)
        plots.scaled(axes, x="linear")
        return left_out

    def told(one: plots.Marks) -> str:
        known = sorted((v, n) for v, n in zip(one.values, names, strict=True) if v is not None)
        (low, fast), (high, slow) = known[0], known[-1]
        between = f"{low:.2f} ({fast}) to {high:.2f} ({slow})" if len(known) > 1 else f"{low:.2f}"
        return f"{one.name} {between}"

    said = f"Here it is {'; '.join(map(told, marks))}. Less is faster."
    return plots.drawing(draw, title, said, plots.height_of(names, len(marks)))
