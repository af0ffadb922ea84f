"""The plots of the page, as small SVG drawings of which several fit side by side on a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafold.files.page import drawing
from lorafold.inspecting.against import kind_of

SMALL, CURVE = (3.6, 2.9), (5.4, 3.2)
POINTS = 300  # of a curve
SCALE = "viridis"

Grid = Sequence[Sequence[float]]


def spectra(kind: str, spectra_by_path: dict[str, Sequence[float]], depth: int) -> str:
    """The singular values of one kind of module, divided by the largest: one line for each block,
    dark for the first blocks.

    Args:
        kind: The title.
        spectra_by_path: Singular values in descending order, by module path.
        depth: The number of the last block.
    """
    from matplotlib import colormaps

    def draw(axes: Any) -> None:
        for path, s in spectra_by_path.items():
            layer = kind_of(path)[1] or 0
            axes.plot(
                range(1, len(s) + 1),
                [x / s[0] for x in s],
                color=colormaps[SCALE](layer / max(depth, 1)),
                linewidth=0.9,
            )
        axes.set(xlabel="direction", ylabel="s / s₁", yscale="log")
        axes.minorticks_off()  # they take a third of the time of the plot

    return drawing(draw, kind, SMALL)


def heat(title: str, grid: Grid, down: str, across: str, first: int = 1) -> str:
    """A heat map of values from 0 to 1.

    Args:
        grid: The values, line by line.
        down, across: The labels of the axes.
        first: The number of the first line and of the first column.
    """

    def draw(axes: Any) -> None:
        lines, columns = len(grid), len(grid[0])
        extent = (first - 0.5, first + columns - 0.5, first + lines - 0.5, first - 0.5)
        shown = axes.imshow(
            grid, vmin=0, vmax=1, cmap=SCALE, extent=extent, aspect="auto", interpolation="nearest"
        )
        axes.set(xlabel=across, ylabel=down)
        axes.figure.colorbar(shown, ax=axes)

    return drawing(draw, title, SMALL)


def line(
    title: str, points: Sequence[tuple[float, float]], across: str, marked: dict[float, str]
) -> str:
    """The loss along a line in weight space.

    Args:
        points: Pairs of t and the loss in nats a token.
        across: The label of the axis of t.
        marked: Names to write at some values of t.
    """

    def draw(axes: Any) -> None:
        axes.plot(*zip(*points, strict=True), marker=".")
        losses = dict(points)
        for t, name in marked.items():
            axes.annotate(
                name,
                (t, losses[t]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set(xlabel=across, ylabel="loss, nats a token")

    return drawing(draw, title, (5.4, 3.4))


def curves(
    title: str,
    steps: Mapping[str, Sequence[float | None]],
    measured: Mapping[str, Sequence[tuple[int, float, Any]]],
) -> str:
    """Figures over the steps of a run; held-out ones have points, with bars for their intervals. Of
    a long run the mean of neighbouring steps is shown.

    Args:
        steps: For each name a value for each step, None where there is none.
        measured: For each name (step, value, interval or None) on held-out rows.
    """

    def draw(axes: Any) -> None:
        shown = []
        for n, name in enumerate(dict.fromkeys([*steps, *measured])):
            colour = f"C{n}"
            if found := means(steps.get(name, ())):
                shown += axes.plot(*zip(*found, strict=True), color=colour, linewidth=1, alpha=0.75)
                shown[-1].set_label(name)
            if points := measured.get(name):
                at, values, intervals = zip(*points, strict=True)
                spread = [
                    [abs(v - (i or (v, v))[side]) for v, i in zip(values, intervals, strict=True)]
                    for side in (0, 1)
                ]
                bars = axes.errorbar(
                    at, values, spread, color=colour, marker="o", markersize=4, capsize=3,
                    markeredgecolor="#222", linewidth=1.4, linestyle="--",
                )  # fmt: skip
                bars.set_label(f"{name}, held out")
                shown.append(bars)
        axes.set(xlabel="step")
        axes.margins(x=0.03)
        if len(shown) > 1:
            legend = axes.legend(shown, [one.get_label() for one in shown], fontsize=7)
            for text in legend.get_texts():
                text.set_parse_math(False)  # a name may have dollar signs

    return drawing(draw, title, CURVE)


def means(values: Sequence[float | None]) -> list[tuple[float, float]]:
    """(step, mean) of neighbouring steps, at most POINTS of them."""
    size = max(1, -(-len(values) // POINTS))
    found = []
    for start in range(0, len(values), size):
        some = [v for v in values[start : start + size] if v is not None]
        if some:
            last = min(start + size, len(values))
            found.append(((start + 1 + last) / 2, sum(some) / len(some)))
    return found


def position(
    title: str, read: Sequence[float], written: Sequence[float], shape: tuple[int, int]
) -> str:
    """The energy of an update on each tenth of the base's singular directions. Dashed lines show
    an even distribution.

    Args:
        read, written: Shares as `base_svd.binned` gives them.
        shape: (out, in) of the weight.
    """

    def draw(axes: Any) -> None:
        bins = range(len(read))
        for label, heights, shift, n in (
            ("read", read, -0.2, shape[1]),
            ("written", written, 0.2, shape[0]),
        ):
            bars = axes.bar([i + shift for i in bins], heights, 0.4, label=label)
            axes.axhline(
                min(shape) / n / (len(read) - 1),
                color=bars[0].get_facecolor(),
                linewidth=0.8,
                linestyle="--",
            )
        axes.set_xticks(list(bins), [*(str(i + 1) for i in bins[:-1]), "out"])
        axes.set(xlabel="tenth of W0's directions, strongest first", ylabel="share of the energy")
        axes.legend(fontsize=8)

    return drawing(draw, title, (5.4, 3.4))


def shade(share: float) -> tuple[str, str]:
    """The background colour for a share from 0 to 1, and a legible text colour on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    r, g, b, _ = colour = colormaps[SCALE](min(max(share, 0.0), 1.0))
    return to_hex(colour), "#000" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "#fff"
