"""The plots of the pages of `lorafold lab inspect` and `lorafold history`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafold.files import plots
from lorafold.inspecting.subspaces import kind_and_block

MAX_POINTS = 300  # points of a curve
LOG_METRICS, LOG_RATIO = ("loss", "gradient norm"), 20  # ratio that makes an axis logarithmic
COLORMAP = "viridis"  # lightness increases with the value

Grid = Sequence[Sequence[float]]


def spectra(kind: str, spectra_by_path: Mapping[str, Sequence[float]], depth: int) -> str:
    lines = sorted(
        (kind_and_block(path)[1] or 0, [x / s[0] for x in s]) for path, s in spectra_by_path.items()
    )
    steepest, spectrum = min(lines, key=lambda line: line[1][-1])
    last = f"{spectrum[-1]:.2g} times the largest"
    caption = f"Block {steepest} decays most: the smallest of its {len(spectrum)} values is {last}."

    def colour(block: int) -> str:
        return plots.ordered_colour(block / max(depth, 1))

    def draw(axes: Any) -> None:
        for block, s in lines:
            axes.plot(range(1, len(s) + 1), s, color=colour(block), linewidth=0.9)
        axes.set(xlabel="direction", ylabel="s / s₁")
        plots.set_scales(axes, x="linear", y="log")
        ends = lines[:1] + lines[-1:] * (len(lines) > 1)
        plots.label_ends(axes, [plots.LineEnd(s[-1], f"block {n}", colour(n)) for n, s in ends])

    return plots.figure_html(draw, kind, caption, plots.SMALL_SIZE)


def heat_map(
    title: str, caption: str, grid: Grid, down: str, across: str, first: int = 1, most: float = 1
) -> str:
    """A heat map of values from 0 to `most`; NaN cells are empty."""

    def draw(axes: Any) -> None:
        lines, columns = len(grid), len(grid[0])
        extent = (first - 0.5, first + columns - 0.5, first + lines - 0.5, first - 0.5)
        shown = axes.imshow(
            grid, vmin=0, vmax=most, cmap=COLORMAP, extent=extent, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.grid(False)
        axes.set(xlabel=across, ylabel=down)
        for axis, n in ((axes.xaxis, columns), (axes.yaxis, lines)):
            axis.set_ticks(range(first, first + n, max(1, -(-n // 6))))
        ticks = (0, most / 2, most)
        bar = axes.figure.colorbar(shown, ax=axes, ticks=ticks, format=plots.tick_label)
        bar.outline.set_lw(0)

    return plots.figure_html(draw, title, caption, plots.SMALL_SIZE)


def line(
    title: str,
    caption: str,
    points: Sequence[tuple[float, float]],
    across: str,
    marked: dict[float, str],
) -> str:
    def draw(axes: Any) -> str:
        axes.plot(*zip(*points, strict=True), **plots.series_style(0))
        axes.set(xlabel=across, ylabel="loss, nats per token")
        plots.set_scales(axes, x="linear", y="linear")
        losses = dict(points)
        return plots.label_points(axes, [(t, losses[t]) for t in marked], list(marked.values()))

    return plots.figure_html(draw, title, caption)


def curves(
    title: str,
    caption: str,
    steps: Mapping[str, Sequence[float | None]],
    measured: Mapping[str, Sequence[tuple[int, float, Any]]],
) -> str:
    lines = {name: line for name, values in steps.items() if (line := downsample(values))}
    heights = [y for one in (*lines.values(), *measured.values()) for _, y, *_ in one]
    is_log = title in LOG_METRICS and min(heights) > 0 and max(heights) > LOG_RATIO * min(heights)

    def draw(axes: Any) -> None:
        ends = []
        for n, (name, line) in enumerate(lines.items()):
            style = plots.series_style(n)
            mark = style["marker"] if len(line) == 1 else ""
            axes.plot(*zip(*line, strict=True), **style | {"marker": mark, "linewidth": 1})
            ends.append(plots.LineEnd(line[-1][1], name, style["color"]))
        names = [*dict.fromkeys([*lines, *measured])]
        for name, points in measured.items():
            # the colour of the metric's line or, if there is only one metric, another colour
            style = plots.series_style(names.index(name) if len(names) > 1 else len(lines))
            x, values, intervals = zip(*points, strict=True)
            style |= {"linestyle": ":"}
            axes.errorbar(x, values, plots.error_bars(values, intervals), **style)
            ends.append(plots.LineEnd(values[-1], f"{name}, held out", style["color"]))
        axes.set(xlabel="step")
        axes.margins(x=0.03)
        plots.set_scales(axes, x="linear", y="log" if is_log else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        plots.label_ends(axes, ends if len(ends) > 1 else [])

    size = (plots.SIZE[0], max(plots.SIZE[1], 0.6 + 0.2 * (len(steps) + len(measured))))
    return plots.figure_html(draw, title, caption, size)


def downsample(values: Sequence[float | None]) -> list[tuple[float, float]]:
    size = max(1, -(-len(values) // MAX_POINTS))
    points = []
    for start in range(0, len(values), size):
        if some := [v for v in values[start : start + size] if v is not None]:
            points.append(((start + 1 + min(start + size, len(values))) / 2, sum(some) / len(some)))
    return points


def position(
    title: str, read: Sequence[float], written: Sequence[float], shape: Sequence[int]
) -> str:
    sides = {"read": (read, shape[1]), "written": (written, shape[0])}
    even_shares = {name: min(shape) / size / (len(read) - 1) for name, (_, size) in sides.items()}

    def draw(axes: Any) -> None:
        bins, ends = range(len(read)), []
        for n, (name, (heights, _)) in enumerate(sides.items()):
            style = plots.series_style(n)
            for tenths, share in ((bins[:-1], heights[:-1]), (bins[-1:], heights[-1:])):
                axes.plot(tenths, share, **style)
            axes.axhline(even_shares[name], **style | {"marker": "", "linewidth": 0.6})
            ends.append(plots.LineEnd(heights[-1], name, style["color"]))
        axes.set_xticks(list(bins), [*(str(i + 1) for i in bins[:-1]), "out"])
        axes.set(xlabel="tenth of W0's directions, strongest first", ylabel="share of the energy")
        plots.set_scales(axes, y="linear")
        plots.label_ends(axes, [*ends, plots.LineEnd(even_shares["read"], "even", plots.FAINT)])

    shares_text = " and ".join(
        f"{heights[0]:.0%} of the energy {name} ({even_shares[name]:.0%} if even)"
        for name, (heights, _) in sides.items()
    )
    return plots.figure_html(draw, title, f"The strongest tenth contains {shares_text}.")
