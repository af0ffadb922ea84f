"""Reports as one self-contained HTML file, with plots inline as SVG, readable on a phone."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorafold.files.atomic import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
td, th { border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
p { max-width: 70ch; } figure { margin: 2rem 0; } svg { max-width: 100%; height: auto; }
"""


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))


def html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in HTML, of texts, which scrolls where it is wider than the page."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>"
        for line in lines
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def document(title: str, body: str, path: str | Path, style: str = "") -> None:
    """Write a page.

    Args:
        title: its title and heading, as text.
        body: its content, as HTML.
        path: the file to write.
        style: CSS in addition to STYLE.
    """
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
""",
    )


def drawing(draw: Callable[[Any], None], title: str, size: tuple[float, float] = (9, 4.5)) -> str:
    """A plot as an HTML figure with inline SVG.

    Args:
        draw: the function that draws on matplotlib's axes.
        title: the title of the plot.
        size: its width and height in inches.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    plot = Figure(figsize=size, layout="constrained")
    axes = plot.add_subplot()
    axes.set_title(title, parse_math=False)  # a name may have dollar signs
    draw(axes)
    text = io.StringIO()
    FigureCanvasSVG(plot).print_svg(text)
    _, tag, rest = text.getvalue().partition("<svg")
    return f"<figure>{tag}{rest}</figure>"
