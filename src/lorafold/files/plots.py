"""Plots in one style, as inline SVG. Their colours are placeholders that `figure_html` replaces by
the page's CSS variables, so that plots follow its light or dark theme.
"""

from __future__ import annotations

import html
import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import product
from os.path import commonprefix
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple
from unicodedata import east_asian_width

log = logging.getLogger(__name__)
NAME_WIDTH, LINE_WIDTH = 24, 16  # characters of a name on one line, and per line of a wrapped name
FILLER = "\u200b"  # zero-width; after a double-width character, it makes len() count columns
Interval = tuple[float, float]
SIZE = (4.5, 3.2)  # inches
SMALL_SIZE = (3.4, 2.7)  # for plots side by side
COLOURS = ("", "ink", "faint", "line", *(f"series-{n}" for n in range(5)))
_, INK, FAINT, _LINE, *SERIES = (f"#0000{n:02x}" for n in range(len(COLOURS)))
DASHES = ("-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 3)))
MARKERS = ("o", "^", "s", "D", "v", "P")
FONT_SIZE = 10  # points; as in STYLE
LINE_HEIGHT = 1.4 * FONT_SIZE  # points
LEADER = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
STYLE = Path(__file__).with_suffix(".mplstyle")


def pad_wide(name: str) -> str:
    """Pads double-width characters, so that the string's length is its width in columns."""
    return "".join(c + FILLER * (east_asian_width(c) in "WF") for c in name.replace(FILLER, ""))


def fit_name(name: str, most: int) -> str:
    """Truncates a name in the middle to at most `most` columns."""
    name, half = pad_wide(name), (most - 1) // 2
    if len(name) <= most:
        return name
    start, end = name[: most - 1 - half], name[len(name) - half :]
    whole = start[:-1] if name[len(start)] == FILLER else start
    return f"{whole}…{end.removeprefix(FILLER)}"


def truncate_distinct(names: Sequence[str], most: int) -> list[str]:
    """Truncates names to `most` columns, or to the smallest larger width at which they differ."""
    shown = [fit_name(name, most) for name in names]
    differ = len({*shown}) == len({*map(pad_wide, names)})
    return shown if differ else truncate_distinct(names, most + 2)


def wrap_name(name: str, most: int) -> str:
    lines = (fill(fit_name(name, size), LINE_WIDTH) for size in range(len(pad_wide(name)), 0, -1))
    return next((text for text in lines if text.count("\n") < most), pad_wide(name))


def without_common(names: Sequence[str]) -> list[str]:
    """Removes the words that all names start or end with, if one name is too long for a line."""
    if len(names) < 2 or all(len(pad_wide(name)) <= NAME_WIDTH for name in names):
        return [*names]
    both = [*names], [name[::-1] for name in names]
    same = (commonprefix(of) for of in both)  # noqa: RUF071 - of characters
    start, end = (len(re.sub(r"[^\W_]+$", "", text)) for text in same)  # whole words
    parts = [name[start : len(name) - end] for name in names]
    return [f"{'…' * (start > 0)}{p}{'…' * (end > 0)}" for p in parts] if all(parts) else [*names]


def figure_html(
    draw: Callable[[Any], str | None], title: str, caption: str, size: tuple[float, float] = SIZE
) -> str:
    """Returns an HTML figure with inline SVG. `draw` draws on matplotlib's axes and may return a
    sentence to append to the caption. `size` is in inches.
    """
    if find_spec("matplotlib") is None:
        warn_not_drawn()
        return _figure(title, f"{caption} To see this plot, install lorafold[plots].", "")
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with rc_context(fname=STYLE), warnings.catch_warnings():
        # matplotlib measures with its font, which lacks glyphs of the page's font
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        plot = Figure(figsize=size, layout="constrained", dpi=72)
        caption += draw(plot.add_subplot()) or ""
        FigureCanvasSVG(plot).print_svg(text, metadata={"Date": None})
    _, tag, rest = text.getvalue().replace(FILLER, "").partition("<svg")
    svg = re.sub(r'(?<=[:\s"])#000([01])([0-9a-f]{2})(?=[;"])', _page_colour, tag + rest)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
    return _figure(title, caption, svg)


def _figure(title: str, caption: str, svg: str) -> str:
    title, caption = html.escape(title), html.escape(caption)
    return f"<figure><figcaption><b>{title}</b> {caption}</figcaption>{svg}</figure>"


@cache
def warn_not_drawn() -> None:
    log.warning("matplotlib is missing, so pages have no plots; install lorafold[plots]")


def _page_colour(found: re.Match[str]) -> str:
    n = int(found[2], 16)
    if found[1] == "1":
        return mix_colours("series-0", "series-1", n)
    return f"var(--{COLOURS[n]})" if n < len(COLOURS) else found[0]


def mix_colours(one: str, other: str, percent: float) -> str:
    return f"color-mix(in oklab, var(--{one}), var(--{other}) {percent:.0f}%)"


def ordered_colour(share: float) -> str:
    """Returns the colour of a line in an ordered set. `share` is 0 for the first line, 1 for the
    last.
    """
    return f"#0001{round(100 * share):02x}"


def series_style(n: int) -> dict[str, Any]:
    return {
        "color": SERIES[n % len(SERIES)],
        "linestyle": DASHES[n % len(DASHES)],
        "marker": MARKERS[n % len(MARKERS)],
    }


def tick_label(value: float, position: Any = None, digits: int = 6) -> str:
    """Formats a number for ticks: 2.7, 0.05, 40k, 1.5M, 2e-7."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    if 1e-12 < abs(value) < 1e-6:
        digit, power = f"{value:.{digits - 1}e}".split("e")
        plain = f"{float(digit):g}e{int(power)}"
    else:
        plain = f"{float(f'{value:.{digits}g}'):z.12f}".rstrip("0").rstrip(".")
    return plain.replace("-", "\N{MINUS SIGN}")


def set_scales(axes: Any, **scales: str) -> None:
    """Sets log or linear scales for `x` and `y`, with few ticks. Call it after drawing, because it
    reads the axes' limits.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for name, scale in scales.items():
        getattr(axes, f"set_{name}scale")(scale)
        axis = getattr(axes, f"{name}axis")
        low, high = sorted(axis.get_view_interval())
        locator: Any = MaxNLocator(5, steps=[1, 2, 5, 10])
        if scale == "log" and high > 6 * low:
            locator = LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=8)
        axis.set_major_locator(locator)
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(tick_label)


def error_bars(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]]:
    pairs = [(v, interval or (v, v)) for v, interval in zip(values, intervals, strict=True)]
    return [[abs(value - interval[side]) for value, interval in pairs] for side in (0, 1)]


def draw_level(axes: Any, name: str, **at: float) -> None:
    [(way, value)] = at.items()
    down = way == "x"
    (axes.axvline if down else axes.axhline)(value, color=FAINT, linewidth=1, linestyle="--")
    place = {"xy": (value, 1), "xycoords": axes.get_xaxis_transform(), "ha": "center"}
    if not down:
        place = {"xy": (1, value), "xycoords": axes.get_yaxis_transform(), "va": "center"}
    axes.annotate(name, **place, color=FAINT, annotation_clip=False)


class Series(NamedTuple):
    name: str
    values: Sequence[float | None]
    intervals: Sequence[Interval | None]


def draw_rows(axes: Any, names: Sequence[str], marks: Sequence[Series], width: int = 24) -> str:
    """Draws a row of points with intervals for each name. If there are several series, labels their
    first points, and returns a sentence that counts the labels that don't fit.
    """
    first = []
    for n, one in enumerate(marks):
        known = [(y, v, i) for y, (v, i) in enumerate(zip(*one[1:], strict=True)) if v is not None]
        at, values, intervals = zip(*known, strict=True)
        heights = [y + 0.3 * (n - (len(marks) - 1) / 2) for y in at]
        style = series_style(n) | {"linestyle": "none"}
        axes.errorbar(values, heights, xerr=error_bars(values, intervals), **style)
        first.append((values[0], heights[0]))
    axes.set_yticks(range(len(names)), truncate_distinct(names, width))
    axes.tick_params("y", labelcolor=INK, length=0)
    axes.set_ylim(len(names) - 0.4, -0.6 - 0.6 * (len(marks) > 1))
    return label_points(axes, first, [one.name for one in marks]) if len(marks) > 1 else ""


def rows_size(names: Sequence[str], marks: int = 1) -> tuple[float, float]:
    return SIZE[0], 0.75 + (0.2 + 0.06 * (marks - 1)) * len(names) + 0.15 * (marks > 1)


class LineEnd(NamedTuple):
    height: float
    name: str
    colour: str


def label_ends(axes: Any, ends: Sequence[LineEnd]) -> None:
    """Writes labels to the right of the axes without overlaps. Call it after drawing, because it
    reads the layout.
    """
    axes.figure.draw_without_rendering()  # computes the layout
    frame = axes.get_window_extent()
    x = axes.get_xlim()[1]
    wanted = sorted((axes.transData.transform((x, end.height))[1], end) for end in ends)
    lines = max(1, int((frame.height + 2 * FONT_SIZE) / LINE_HEIGHT / max(1, len(ends))))
    names = [wrap_name(end.name, lines) for _, end in wanted]
    halves = [LINE_HEIGHT * (1 + name.count("\n")) / 2 for name in names]
    heights, floor, ceiling = [at for at, _ in wanted], frame.y0 - FONT_SIZE, frame.y1 + FONT_SIZE
    for n, half in enumerate(halves):
        heights[n] = max(heights[n], floor + half)
        floor = heights[n] + half
    for n, half in reversed([*enumerate(halves)]):
        heights[n] = min(heights[n], ceiling - half)
        ceiling = heights[n] - half
    for (at, end), name, height in zip(wanted, names, heights, strict=True):
        axes.annotate(
            name, (1, end.height), (14, height - at), axes.get_yaxis_transform(), "offset points",
            color=end.colour, va="center", annotation_clip=False,
            arrowprops=LEADER | {"color": end.colour, "relpos": (0, 0.5)},
        )  # fmt: skip


def label_points(axes: Any, points: Sequence[tuple[Any, Any]], names: Sequence[str]) -> str:
    """Writes labels near points, inside the frame and without overlaps. Returns a sentence that
    counts the labels that don't fit. Call it after drawing, because it reads the layout.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # computes the layout
    frame, at = axes.get_window_extent(), axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    left_out = 0
    for point, (x, y), name in zip(points, at, truncate_distinct(names, NAME_WIDTH), strict=True):
        measured = axes.text(*point, name)
        wide = measured.get_window_extent().width
        measured.remove()
        for far, (right, up) in product((6, 12, 20, 30, 42, 56), sides):
            left = x + right * far + (right - 1) / 2 * wide
            low = y + up * far + (up - 1) / 2 * LINE_HEIGHT
            box = Bbox.from_bounds(left, low, wide, LINE_HEIGHT)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                axes.annotate(
                    name, point, (left - x, low - y), textcoords="offset points",
                    arrowprops=LEADER, va="bottom",
                ).set_in_layout(False)  # fmt: skip
                break
        else:
            left_out += 1
    what = "name of one point" if left_out == 1 else f"names of {left_out} points"
    return f" The plot has no room for the {what}." if left_out else ""
