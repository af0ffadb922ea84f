"""Shows an estimate: as bars on a terminal, and as a page that explains each term."""

from __future__ import annotations

import html
from pathlib import Path

from lorafold.files.page import document
from lorafold.memory.advice import Advice
from lorafold.memory.terms import TERMS, Estimate
from lorafold.memory.trace import Setting
from lorafold.step.adamw import in_words

WIDTH = 40  # characters of the longest bar
COLOURS = dict(
    zip(
        TERMS,
        (
            "#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#9d755d",
            "#bab0ac", "#ff9da6",
        ),
        strict=True,
    )
)  # fmt: skip
HEAD = '<tr><th>term</th><th>bytes</th><th>share</th><th class="words">what it is</th></tr>'
STYLE = """
.stack { display: flex; height: 3.5rem; position: relative; }
.stack { border: 1px solid #222; background: #f2f2f2; }
.stack .limit { position: absolute; top: -.5rem; bottom: -.5rem; border-left: 3px solid #222; }
.swatch { display: inline-block; width: .8rem; height: .8rem; margin-right: .5rem; }
.words { text-align: left; white-space: normal; min-width: 11rem; }
"""


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
    """Return the line that compares the estimate with the measured bytes."""
    return (
        f"measured     {in_words(measured):>9}  the estimate is"
        f" {found.total / measured - 1:+.1%} off"
    )


def page(
    found: Estimate, title: str, path: Path, said: list[str], memory: int | None = None
) -> None:
    """Write an HTML page with the terms as a stacked bar and as a table that explains them.

    Args:
        title: The title of the page.
        path: The file to write.
        said: Lines to show below the bar.
        memory: The device's bytes, to which the bar is drawn to scale; None if not known.
    """
    whole = max(found.total, memory or 0)
    stack = "".join(
        f'<div style="background:{COLOURS[name]};width:{100 * n / whole:.3f}%" title="{words(name)}'
        f' {in_words(n)}"></div>'
        for name, n in shown(found).items()
    )
    rows = "".join(
        f'<tr><td><span class="swatch" style="background:{COLOURS[name]}"></span>{words(name)}</td>'
        f"<td>{in_words(n)}</td><td>{n / found.total:.1%}</td>"
        f'<td class="words">{html.escape(" ".join((TERMS[name].__doc__ or "").split()))}</td></tr>'
        for name, n in shown(found).items()
    )
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in said)
    limit = (
        ""
        if memory is None
        else (
            f'<div class="limit" style="left:{100 * memory / whole:.3f}%" title="the device"></div>'
        )
    )
    of = "" if memory is None else f" of {in_words(memory)}"
    document(
        title,
        f"""<p><strong>{in_words(found.total)}</strong>{of} at the peak,
as torch's allocator counts.</p>
<div class="stack" role="img" aria-label="memory by term">{stack}{limit}</div>
<ul>{lines}</ul>
<div class="wide"><table><thead>{HEAD}</thead><tbody>{rows}</tbody></table></div>
<p>The process itself, kernels' scratch memory and the allocator's gaps come on top.</p>""",
        path,
        STYLE,
    )
