"""Shows an estimate: as bars on a terminal, and as a page that explains each term."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from lorafold.files.html_page import html_table, notes, section, write_page
from lorafold.files.plots import FAINT, INK, SERIES, SIZE, drawing, level, scaled
from lorafold.memory.estimate import TERMS, Estimate
from lorafold.memory.fit import Advice
from lorafold.memory.trace import Setting
from lorafold.training_step.adamw import in_words

WIDTH = 40  # characters of the longest bar


def shown(found: Estimate) -> dict[str, int]:
    """Return the terms that are not 0."""
    return {name: n for name, n in found.terms.items() if n}


def bars(found: Estimate) -> list[str]:
    """Return a line with a bar for every term, and a line with their sum."""
    most = max(found.terms.values())
    lines = [
        f"{words(name):<12} {in_words(n):>9}  {'█' * max(1, round(WIDTH * n / most))}"
        for name, n in shown(found).items()
    ]
    return [*lines, f"{'total':<12} {in_words(found.total):>9}"]


def words(name: str) -> str:
    """Return the name of a term with spaces."""
    return name.replace("_", " ")


def verdict(advice: Advice, asked: Setting) -> list[str]:
    """Return lines that say whether the setting fits, the largest batch and length that do, and
    which changes would help.
    """
    says = (
        f"fits, with {in_words(advice.spare)} to spare"
        if advice.fits
        else f"does not fit: {in_words(-advice.spare)} short"
    )
    most = [
        f"largest batch at {asked.length} tokens: {advice.batch}",
        f"largest length at batch {asked.batch}: {advice.length}",
    ] * (advice.batch is not None)
    changes = [f"would fit with {name}: {in_words(n)}" for name, n in advice.changes]
    return [says, *most, *(changes or ["no single change would make it fit"] * (not advice.fits))]


def together(found: Estimate, asked: Setting, speed: float) -> list[str]:
    """Return the lines about what several processes send each other; none for one alone.

    Args:
        speed: The operations a second of a device.
    """
    if (sent := found.sent) is None:
        return []
    return [
        f"in each of {asked.processes} processes, with {asked.strategy}",
        f"a step of one micro-batch sends {in_words(sent.bytes)} from each, which takes as long as"
        f" computing at {in_words(int(sent.bandwidth(speed)))}/s, where a device computes"
        f" {speed / 1e12:g} TFLOP/s",
    ]


def about(asked: Setting) -> str:
    """Return the line that says how this machine's CPU multiplies, which the estimate follows."""
    how = "in fp32" if asked.widened else "in 16 bits"
    return f"for this machine's CPU, which multiplies 16-bit matrices {how}"


def beside(found: Estimate, measured: int) -> str:
    """Return the line that compares the estimate with the measured bytes, both of tensors alone."""
    return (
        f"measured     {in_words(measured):>9}  of tensors, as torch's allocator counts; the"
        f" estimate is {found.total / measured - 1:+.1%} off"
    )


def counted(found: Estimate) -> str:
    """Return what the bytes of an estimate are, as a clause."""
    if found.terms["process"]:
        return "the resident memory of the process, without the libraries that it imports"
    return "as torch's allocator counts tensors, without kernels' scratch memory and gaps"


def page(
    found: Estimate, title: str, path: Path, said: list[str], memory: int | None = None
) -> None:
    """Write an HTML page with the terms as bars and as a table that explains them.

    Args:
        title: The title of the page.
        path: The file to write.
        said: Lines to show above the bars.
        memory: The device's bytes, at which a line is drawn; None if not known.
    """
    cells = [
        [words(name), in_words(n), f"{n / found.total:.1%}", TERMS[name]]
        for name, n in shown(found).items()
    ]
    parts = (
        notes(said),
        picture(found, memory),
        section("What each term is"),
        html_table(("term", "bytes", "share", "what it is"), cells, "texts"),
        f"<p>Counted: {counted(found)}.</p>",
    )
    write_page(title, "\n".join(parts), path)


def picture(found: Estimate, memory: int | None) -> str:
    """The terms as bars, each of which begins where the one above it ends, and their sum."""
    terms = shown(found)
    names, sizes = [*map(words, terms), "total"], [*terms.values(), found.total]
    starts = [*accumulate([*terms.values()][:-1], initial=0), 0]

    def draw(axes: Any) -> None:
        axes.barh(names, sizes, 0.6, starts, color=[*[SERIES[0]] * len(terms), FAINT])
        for y, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            axes.annotate(
                in_words(size), (start + size, y), (4, 0), textcoords="offset points", va="center"
            )
        if memory is not None:
            level(axes, "the device", x=memory)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.25 * max(found.total, memory or 0))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params("y", labelcolor=INK, length=0)
        scaled(axes, x="linear")
        axes.xaxis.set_major_formatter(lambda n, _: in_words(int(n)) if n else "0")

    most = max(terms, key=lambda name: terms[name])
    of = "" if memory is None else f" of the device's {in_words(memory)}"
    said = (
        f"{in_words(found.total)}{of} at the peak, {counted(found)}; the most is"
        f" {words(most)}, {terms[most] / found.total:.0%}."
    )
    return drawing(draw, "Memory by term", said, (SIZE[0], 0.7 + 0.22 * len(names)))
