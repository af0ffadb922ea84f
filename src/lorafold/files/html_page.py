"""Pages: what each report writes as one HTML file that needs no other, in one frame and one look.

A page follows the light or dark of its reader, fits a phone, and needs no colour to be understood:
sentences, figures in cards, tables that scroll in a box of their own, and the pictures of
`files.plots`.

A result in a notebook (`ShownInNotebooks`) has its figures as tables without styles, so that they
have the notebook's own colours, dark ones too.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafold.errors import cut
from lorafold.files.atomic import write_text
from lorafold.files.model_card import within

STYLES = ("look.css", "page.css")
LINES = 30  # of a table, at most
ENTRIES = 16  # of a mapping whose entries are shown, at most
INTERVAL = "_interval"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, of texts."""
    rule = ["---"] * len(head)
    cells = ([text.replace("|", r"\|") for text in line] for line in (head, rule, *lines))
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in HTML, of texts, which scrolls where it is wider than the page."""
    return table(head, ([html.escape(text) for text in line] for line in lines))


def table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML.

    Args:
        head: The headings, as text.
        lines: The cells of each line.
        kind: A class of the style, such as `texts` for cells that are read and not compared.
    """
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    of = f' class="{kind}"' if kind else ""
    whole = f"<table{of}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def section(title: str, about: str = "") -> str:
    """The heading of a section, and what there is to know of it, both as text."""
    told = f"<p>{html.escape(about, quote=False)}</p>" if about else ""
    return f"<h2>{html.escape(title)}</h2>{told}"


def notes(texts: Iterable[str]) -> str:
    """Sentences that say what follows, as a list; nothing without any."""
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<ul class="notes">{listed}</ul>' if listed else ""


def cards(figures: Mapping[str, str]) -> str:
    """Figures by their names, in boxes."""
    boxes = (f"<div><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in figures.items())
    return f'<div class="cards">{"".join(boxes)}</div>'


def grid(parts: Iterable[str], kind: str = "grid") -> str:
    """Parts side by side, as many as fit; those of `grid small` may be narrower."""
    return f'<div class="{kind}">{"".join(parts)}</div>'


def rendered(template: str, **values: Any) -> str:
    """The HTML that a template makes of values. Texts are escaped; what the functions above and
    `files.plots` give is HTML already: `{{ grid(plots) }}`.

    Args:
        template: Its path in the package, as in inspecting/inspect.html.
        values: By the names that they have in the template.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=PackageLoader("lorafold", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    for part in (html_table, table, section, notes, cards, grid):
        made.globals[part.__name__] = lambda *given, part=part: Markup(part(*given))
    return made.get_template(template).render(values)


def document(title: str, body: str, path: str | Path) -> None:
    """Write a page.

    Args:
        title: Its title and heading, as text.
        body: Its content, as HTML.
        path: The file to write.
    """
    place = files("lorafold.files")
    style = "".join((place / name).read_text(encoding="utf-8") for name in STYLES)
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{style}</style>
<main>
<h1>{html.escape(title)}</h1>
{body}
</main>
</html>
""",
    )


class ShownInNotebooks:
    """A dataclass that notebooks show as tables: the figures of its `as_json`, or its fields."""

    def _repr_html_(self) -> str:
        own = getattr(self, "as_json", None)
        found = own() if own else {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        lines = [*_lines(found)]
        tables = [_table(["figure", "value"], lines)] if lines else []
        return "".join([*tables, *(_by_row(rows) for rows in found.values() if _are_rows(rows))])


def _lines(values: Mapping[str, Any], above: str = "") -> Iterator[list[str]]:
    """The name and the text of each figure, of mappings those of their entries."""
    for key, value in values.items():
        name = f"{above}{key}".replace("_", " ")
        if value is None or key.endswith(INTERVAL) or _are_rows(value):
            continue
        if isinstance(value, Mapping):
            if len(value) > ENTRIES or any(isinstance(v, Mapping) for v in value.values()):
                yield [name, f"{len(value):,} entries"]
            else:
                yield from _lines(value, f"{name}, ")
        elif text := _text(value):
            yield [name, text + within(values.get(f"{key}{INTERVAL}"))]


def _text(value: Any) -> str:
    """A value as a cell."""
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        return cut(str(value), 200)
    if len(value) > 4 and all(isinstance(one, int | float) for one in value):
        return f"{_text(value[0])} ... {_text(value[-1])} ({len(value):,})"
    if len(value) > ENTRIES:
        return f"{len(value):,} entries"
    sentences = all(isinstance(one, str) and one.endswith(".") for one in value)
    return (" " if sentences else ", ").join(map(_text, value))


def _are_rows(value: Any) -> bool:
    several = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return several and all(isinstance(one, Mapping) for one in value)


def _by_row(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a line a row, of what is no table itself."""
    keys = dict.fromkeys(key for row in rows for key in row)
    flat = [
        key
        for key in keys
        if not key.endswith(INTERVAL)
        and not any(isinstance(row.get(key), Mapping) or _are_rows(row.get(key)) for row in rows)
        and any(row.get(key) not in (None, "", [], ()) for row in rows)
    ]
    lines = [
        [
            "" if row.get(key) is None else _text(row[key]) + within(row.get(f"{key}{INTERVAL}"))
            for key in flat
        ]
        for row in rows
    ]
    return _table([key.replace("_", " ") for key in flat], lines) if flat else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of no more than LINES lines, and how many more there are."""
    more = len(lines) - LINES
    shown = [*lines[:LINES], *([[f"... and {more:,} more"]] if more > 0 else [])]
    return html_table(head, shown)
