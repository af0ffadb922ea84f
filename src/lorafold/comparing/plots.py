"""The plots of a comparison: quality against what it costs, and latencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lorafold.comparing.measure import BASE, Measurement
from lorafold.comparing.paired import by_method, lower_is_better
from lorafold.files.page import drawing

SMALLEST = 1e-6  # of what a logarithmic axis shows


@dataclass(frozen=True)
class Quality:
    """What methods are compared by, upwards in a plot: the value of each method, and the base's."""

    label: str
    scale: str
    values: list[float | None]
    base: float | None = None

    @classmethod
    def of(cls, measurements: Sequence[Measurement]) -> Quality:
        """The held-out loss or reward."""
        methods = [seeds for seeds in by_method(measurements) if seeds[0].method != BASE]
        bare = [[r for r in measurements if r.method == BASE]]
        if lower_is_better(measurements):
            label, [before] = "held-out loss (lower is better)", means(bare, lambda r: r.loss)
            return cls(label, "log", means(methods, lambda r: r.loss), before)
        [before] = means(bare, lambda r: r.reward)
        label = "held-out reward (higher is better)"
        return cls(label, "linear", means(methods, lambda r: r.reward), before)


def means(
    methods: Sequence[Sequence[Measurement]], value: Callable[[Measurement], float | None]
) -> list[float | None]:
    """The mean of a figure over the seeds of each method; None where it has none."""
    known = [[v for r in seeds if (v := value(r)) is not None] for seeds in methods]
    return [fmean(values) if values else None for values in known]


def plots_of(measurements: Sequence[Measurement]) -> list[str]:
    """The plots, as HTML figures.

    Args:
        measurements: In the order of the methods.
    """
    methods = [seeds for seeds in by_method(measurements) if seeds[0].method != BASE]
    if not methods:
        return []
    quality = Quality.of(measurements)
    names = [seeds[0].method for seeds in methods]
    mergeable = [all(r.mergeable for r in seeds) for seeds in methods]
    size = means(methods, lambda r: r.trainable_parameters)
    forgotten = means(
        methods, lambda r: None if r.forgetting_kl is None else max(r.forgetting_kl, SMALLEST)
    )
    across = "trainable parameters"
    plots = [scatter("Quality against parameters", across, size, quality, names, mergeable)]
    if None not in forgotten:
        across = "forgetting: KL from the base on text outside the task, nats a token"
        plots.append(
            scatter("Quality against forgetting", across, forgotten, quality, names, mergeable)
        )
    for what, attached, merged in (
        ("Decode", lambda r: r.latency_attached, lambda r: r.latency_merged),
        ("Prefill", lambda r: r.prefill_attached, lambda r: r.prefill_merged),
    ):
        both = means(methods, attached), means(methods, merged)
        if any(both[0]):
            plots.append(bars(f"{what} latency, relative to the base", names, *both))
    return plots


def scatter(
    title: str,
    across: str,
    x: Sequence[float | None],
    quality: Quality,
    names: Sequence[str],
    mergeable: Sequence[bool],
) -> str:
    """A plot of the quality over another figure, with the methods' names.

    Args:
        across: The label of the other figure.
        x: The other figure of each method.
        quality: What methods are compared by.
        names: The names of the methods.
        mergeable: Whether each method is mergeable, which chooses its marker.
    """
    y = quality.values

    def draw(axes: Any) -> None:
        if quality.base is not None:
            axes.axhline(quality.base, color="black", linewidth=0.8, label="the base")
        for wanted, marker, label in ((True, "o", "mergeable"), (False, "^", "not mergeable")):
            if chosen := [i for i, merges in enumerate(mergeable) if merges is wanted]:
                axes.scatter(
                    [x[i] for i in chosen], [y[i] for i in chosen], marker=marker, label=label
                )
        axes.set(xlabel=across, ylabel=quality.label, xscale="log", yscale=quality.scale)
        axes.legend()
        for name, x_at, y_at, shift in zip(names, x, y, shifts(x, quality), strict=True):
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


def shifts(x: Sequence[float | None], quality: Quality) -> list[float]:
    """How many points each label must move up so that none covers another, on axes of about 550 by
    250 points, the lower one logarithmic.
    """

    def spread(values: Sequence[float | None], length: float) -> list[float]:
        at = [value or 0 for value in values]
        return [length * (v - min(at)) / ((max(at) - min(at)) or 1) for v in at]

    def logs(values: Sequence[float | None]) -> list[float]:
        return [math.log(value or 1) for value in values]

    y = quality.values
    across, up = spread(logs(x), 550), spread(logs(y) if quality.scale == "log" else y, 250)
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
