"""Plots in one style, as SVG inside of a page: names stand beside what they name, intervals are
drawn, and numbers are plain.

    drawing(draw, "Loss", "It fell from 3.1 to 0.4.")     draw(axes) draws, on matplotlib's axes

Colours are those of the page (`page.css`), so that a plot follows the page's light and dark: while
matplotlib draws, a stand-in is in place of each. Series differ by dash and marker too.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import product, takewhile
from textwrap import fill
from typing import Any, NamedTuple
from unicodedata import east_asian_width

WIDE, ROOM = 24, 16  # characters of a name in one line, and of a line of several
SECOND = "\u200b"  # invisible: stands after a character that is as wide as two, to be counted
Interval = tuple[float, float]
SIZE = (4.5, 3.2)  # inches; on a phone a plot has four fifths of its size
SMALL = (3.4, 2.7)  # of several side by side
COLOURS = ("", "ink", "faint", "line", *(f"series-{n}" for n in range(5)))
_, INK, FAINT, LINE, *SERIES = (f"#0000{n:02x}" for n in range(len(COLOURS)))
DASHES = ("-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 3)))
MARKERS = ("o", "^", "s", "D", "v", "P")
TEXT = 10  # points of a name's height
TALL = 1.4 * TEXT  # of a line of names, in the fonts of pages
LEADER = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # texts stay texts, in the page's font, which is no wider
    "svg.hashsalt": "lorafold",
    "text.parse_math": False,  # a name may have dollar signs
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
}


def spaced(name: str) -> str:
    """A name as wide as it has characters: with a second one behind each that is as wide as two."""
    wide = (c + SECOND * (east_asian_width(c) in "WF") for c in name.replace(SECOND, ""))
    return "".join(wide)


def short(name: str, most: int) -> str:
    """A name of at most this width in characters: of a longer one its beginning and its end."""
    name, half = spaced(name), (most - 1) // 2
    if len(name) <= most:
        return name
    start, end = name[: most - 1 - half], name[len(name) - half :]
    whole = start[:-1] if name[len(start)] == SECOND else start
    return f"{whole}…{end.removeprefix(SECOND)}"


def distinct(names: Sequence[str], most: int) -> list[str]:
    """Names of at most this width in characters, or of the width that tells them apart."""
    shown = [short(name, most) for name in names]
    told_apart = len({*shown}) == len({*map(spaced, names)})
    return shown if told_apart else distinct(names, most + 2)


def folded(name: str, most: int) -> str:
    """A name on at most this many lines, shortened where it takes more."""
    name = spaced(name)
    sizes = range(len(name), 0, -1)
    lines = (fill(short(name, size), ROOM) for size in sizes)
    return next((text for text in lines if text.count("\n") < most), name)


def common(names: Sequence[str]) -> int:
    """How many characters at the beginning are the same in all names, up to the end of a word."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return len(re.sub(r"[^\W_]+$", "", "".join(letters[0] for letters in same)))


def brief(names: Sequence[str]) -> list[str]:
    """Names without the words at which all begin and end, where some are too long for a line."""
    if len(names) < 2 or all(len(spaced(name)) <= WIDE for name in names):
        return [*names]
    start, end = map(common, (names, [name[::-1] for name in names]))
    parts = [name[start : len(name) - end] for name in names]
    return [f"{'…' * (start > 0)}{p}{'…' * (end > 0)}" for p in parts] if all(parts) else [*names]


def drawing(
    draw: Callable[[Any], str | None], title: str, said: str, size: tuple[float, float] = SIZE
) -> str:
    """A plot as an HTML figure with inline SVG.

    Args:
        draw: The function that draws on matplotlib's axes, and may say what it had to leave out.
        title: What is drawn, as text.
        said: What the plot shows here, in sentences with its figures.
        size: Its width and height in inches.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        # the page's font has what matplotlib's, which measures, has not
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        plot = Figure(figsize=size, layout="constrained", dpi=72)
        said += draw(plot.add_subplot()) or ""
        FigureCanvasSVG(plot).print_svg(text, metadata={"Date": None})
    _, tag, rest = text.getvalue().partition("<svg")
    rest = rest.replace(SECOND, "")
    drawn = re.sub(r'(?<=[:\s"])#000([01])([0-9a-f]{2})(?=[;"])', _of_page, tag + rest)
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> {html.escape(said)}</figcaption>"
        f'{drawn.replace("<svg", f"""<svg role="img" aria-label="{html.escape(title)}" """, 1)}'
        "</figure>"
    )


def _of_page(found: re.Match[str]) -> str:
    """The page's colour in place of its stand-in."""
    n = int(found[2], 16)
    if found[1] == "0" and n >= len(COLOURS):
        return found[0]
    return f"var(--{COLOURS[n]})" if found[1] == "0" else mixed("series-0", "series-1", n)


def mixed(one: str, other: str, percent: float) -> str:
    """A colour between two of the page, as CSS."""
    return f"color-mix(in oklab, var(--{one}), var(--{other}) {percent:.0f}%)"


def between(share: float) -> str:
    """The colour of a line that is one of an order: of the first one at 0, of the last one at 1."""
    return f"#0001{round(100 * share):02x}"


def series(n: int) -> dict[str, Any]:
    """The colour, dash and marker of a series by its number."""
    return {
        "color": SERIES[n % len(SERIES)],
        "linestyle": DASHES[n % len(DASHES)],
        "marker": MARKERS[n % len(MARKERS)],
    }


def number(value: float, position: Any = None, digits: int = 6) -> str:
    """A plain number, as at a tick: 2.7, 0.05, 40k, 1.5M, 2e-7."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    if 1e-12 < abs(value) < 1e-6:
        digit, power = f"{value:.{digits - 1}e}".split("e")
        plain = f"{float(digit):g}e{int(power)}"
    else:
        plain = f"{float(f'{value:.{digits}g}'):z.12f}".rstrip("0").rstrip(".")
    return plain.replace("-", "\N{MINUS SIGN}")


def scaled(axes: Any, **scales: str) -> None:
    """Set the scales of the axes `x` and `y`, log or linear, with a few plain numbers at each. To
    be called once everything is drawn.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for name, scale in scales.items():
        getattr(axes, f"set_{name}scale")(scale)
        axis = getattr(axes, f"{name}axis")
        low, high = sorted(axis.get_view_interval())
        many = scale == "log" and high > 6 * low
        steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
        near = MaxNLocator(5, steps=[1, 2, 5, 10])
        axis.set_major_locator(LogLocator(subs=steps, numticks=8) if many else near)
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(number)


def spread(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]]:
    """How far intervals reach below and above their values, as matplotlib's error bars want it."""
    known = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    return [
        [abs(value - interval[side]) for value, interval in zip(values, known, strict=True)]
        for side in (0, 1)
    ]


def level(axes: Any, name: str, **at: float) -> None:
    """A line across the axes at a value of `y`, or down the axes at one of `x`, with its name."""
    [(way, value)] = at.items()
    (axes.axvline if way == "x" else axes.axhline)(value, color=FAINT, linewidth=1, linestyle="--")
    text: dict[str, Any] = {"color": FAINT, "annotation_clip": False}
    if way == "x":
        axes.annotate(name, (value, 1), xycoords=axes.get_xaxis_transform(), ha="center", **text)
    else:
        axes.annotate(name, (1, value), xycoords=axes.get_yaxis_transform(), va="center", **text)


class Series(NamedTuple):
    """One figure of each row, and its interval."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[Interval | None]


def rows(axes: Any, names: Sequence[str], marks: Sequence[Series], most: int = WIDE) -> str:
    """Figures of named rows as points with their intervals, from left to right. Where there are
    several figures, their names stand beside the points of the first row that has them; a sentence
    says for how many there is no room. Names have at most the width `most`, or what tells them
    apart.
    """
    first = list[tuple[float, float]]()
    for n, one in enumerate(marks):
        known = [(y, v, i) for y, (v, i) in enumerate(zip(*one[1:], strict=True)) if v is not None]
        at, values, intervals = zip(*known, strict=True)
        heights = [y + 0.3 * (n - (len(marks) - 1) / 2) for y in at]
        style = series(n) | {"linestyle": "none"}
        axes.errorbar(values, heights, xerr=spread(values, intervals), **style)
        first.append((values[0], heights[0]))
    axes.set_yticks(range(len(names)), distinct(names, most))
    axes.tick_params("y", labelcolor=INK, length=0)
    axes.set_ylim(len(names) - 0.4, -0.6 - 0.6 * (len(marks) > 1))
    return at_points(axes, first, [one.name for one in marks]) if len(marks) > 1 else ""


def height_of(names: Sequence[str], marks: int = 1) -> tuple[float, float]:
    """The size of a plot of rows, in inches."""
    return SIZE[0], 0.75 + (0.2 + 0.06 * (marks - 1)) * len(names) + 0.15 * (marks > 1)


class End(NamedTuple):
    """A name at the right end of a line, at its last value."""

    height: float
    name: str
    colour: str


def at_ends(axes: Any, ends: Sequence[End]) -> None:
    """Write names to the right of the axes, none over another. To be called once all is drawn."""
    axes.figure.draw_without_rendering()  # the layout, which has the heights
    frame = axes.get_window_extent()
    x = axes.get_xlim()[1]
    wanted = sorted((axes.transData.transform((x, end.height))[1], end) for end in ends)
    lines = max(1, int((frame.height + 2 * TEXT) / TALL / max(1, len(ends))))  # of each
    names = [folded(end.name, lines) for _, end in wanted]
    tall = [TALL * (1 + name.count("\n")) for name in names]
    placed, floor = list[float](), frame.y0 - TEXT
    for (height, _), size in zip(wanted, tall, strict=True):
        placed.append(max(height, floor + size / 2))
        floor = placed[-1] + size / 2
    ceiling = frame.y1 + TEXT
    for n in reversed(range(len(placed))):
        placed[n] = min(placed[n], ceiling - tall[n] / 2)
        ceiling = placed[n] - tall[n] / 2
    for (height, end), name, at in zip(wanted, names, placed, strict=True):
        axes.annotate(
            name, (1, end.height), (14, at - height), axes.get_yaxis_transform(), "offset points",
            color=end.colour, va="center", annotation_clip=False,
            arrowprops=LEADER | {"color": end.colour, "relpos": (0, 0.5)},
        )  # fmt: skip


def at_points(axes: Any, points: Sequence[tuple[Any, Any]], names: Sequence[str]) -> str:
    """Write names beside points: as near as there is room inside of the frame, over no other name
    and no point. A sentence says for how many there is none. To be called once all is drawn.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # the layout, which names inside of the frame don't change
    frame, at = axes.get_window_extent(), axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]

    def box(x: float, y: float, size: tuple[float, float], how: tuple[float, ...]) -> Any:
        far, right, up = how
        left, low = (
            start + side * far + (side - 1) / 2 * length
            for start, side, length in ((x, right, size[0]), (y, up, size[1]))
        )
        return Bbox.from_bounds(left, low, *size)

    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    around = [(far, *side) for far, side in product((6, 12, 20, 30, 42, 56), sides)]
    left_out = 0
    for point, (x, y), name in zip(points, at, distinct(names, WIDE), strict=True):
        measured = axes.text(*point, name)
        size = (measured.get_window_extent().width, TALL)
        measured.remove()
        boxes = [box(x, y, size, how) for how in around]
        inside = [b for b in boxes if frame.x0 <= b.x0 and b.x1 <= frame.x1]
        inside = [b for b in inside if frame.y0 <= b.y0 and b.y1 <= frame.y1]
        free = [b for b in inside if not any(b.overlaps(other) for other in taken)]
        if not free:
            left_out += 1
            continue
        found = free[0]
        taken.append(found)
        axes.annotate(
            name, point, (found.x0 - x, found.y0 - y), textcoords="offset points",
            arrowprops=LEADER, va="bottom",
        ).set_in_layout(False)  # fmt: skip
    what = "name of one point" if left_out == 1 else f"names of {left_out} points"
    return f" For the {what} there is no room." if left_out else ""
