"""A page for people: one HTML file that needs nothing beside itself."""

from __future__ import annotations

import html
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } .words { text-align: left; white-space: normal; min-width: 11rem; }
.sticky td:first-child, .sticky th:first-child { position: sticky; left: 0; background: #fff; }
p { max-width: 70ch; } figure { margin: 2rem 0; } svg { max-width: 100%; height: auto; }
"""


def write_page(path: Path, title: str, body: str, style: str = "") -> None:
    """Write it: the title as its heading, then `body`, which is HTML; `style` is CSS of its own."""
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
"""
    path.write_text(text, encoding="utf-8")
