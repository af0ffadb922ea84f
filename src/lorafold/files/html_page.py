"""Self-contained HTML reports, and tables for notebooks.

The macros of `parts.html` (tables, sections, notes, cards, grids) are globals of all templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafold.errors import truncate
from lorafold.files.atomic import write_text
from lorafold.files.templates import environment, format_value, interval_text

STYLES = ("look.css", "page.css")
MACROS = ("table", "section", "notes", "cards", "grid")
MAX_LINES = 30  # of a table
MAX_ENTRIES = 16  # for a larger mapping or list, only the number of entries is shown
INTERVAL_SUFFIX = "_interval"
Table = tuple[list[str], list[list[str]]]  # headings, lines


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    cells = ([text.replace("|", r"\|") for text in line] for line in (head, rule, *lines))
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


@cache
def _environment() -> Any:
    made = environment(True)
    parts = made.get_template("files/parts.html").module
    made.globals.update({name: getattr(parts, name) for name in MACROS})
    return made


def render_page(template: str, **values: Any) -> str:
    """Renders a template, given by its path in the package. Values are escaped unless they are
    Markup.
    """
    return str(_environment().get_template(template).render(values))


def write_page(title: str, body: str, path: str | Path) -> None:
    style = "".join((files("lorafold.files") / name).read_text(encoding="utf-8") for name in STYLES)
    write_text(path, render_page("files/page.html", title=title, body=body, style=style) + "\n")


class ShownInNotebooks:
    """Base class of dataclasses that notebooks display as tables."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def _repr_html_(self) -> str:
        content = self.as_json()
        tables = [(["figure", "value"], [*_lines(content)])]
        tables += [_by_row(rows) for rows in content.values() if _are_rows(rows)]
        return render_page("files/notebook.html", tables=tables, most=MAX_LINES)


def _lines(values: Mapping[str, Any], above: str = "") -> Iterator[list[str]]:
    for key, value in values.items():
        name = f"{above}{key}".replace("_", " ")
        if value is None or key.endswith(INTERVAL_SUFFIX) or _are_rows(value):
            continue
        if not isinstance(value, Mapping):
            if text := _text(value):
                yield [name, text + interval_text(values.get(f"{key}{INTERVAL_SUFFIX}"))]
        elif len(value) > MAX_ENTRIES or any(isinstance(v, Mapping) for v in value.values()):
            yield [name, f"{len(value):,} entries"]
        else:
            yield from _lines(value, f"{name}, ")


def _text(value: Any) -> str:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return "" if value is None else truncate(format_value(value), 200)
    if len(value) > 4 and all(isinstance(one, int | float) for one in value):
        return f"{_text(value[0])} ... {_text(value[-1])} ({len(value):,})"
    if len(value) > MAX_ENTRIES:
        return f"{len(value):,} entries"
    sentences = all(isinstance(one, str) and one.endswith(".") for one in value)
    return (" " if sentences else ", ").join(map(_text, value))


def _are_rows(value: Any) -> bool:
    several = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return several and all(isinstance(one, Mapping) for one in value)


def _by_row(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    shown = [
        key
        for key, values in columns.items()
        if not key.endswith(INTERVAL_SUFFIX)
        and not any(isinstance(value, Mapping) or _are_rows(value) for value in values)
        and any(value not in (None, "", [], ()) for value in values)
    ]
    lines = [
        [_text(row.get(key)) + interval_text(row.get(f"{key}{INTERVAL_SUFFIX}")) for key in shown]
        for row in rows
    ]
    return [key.replace("_", " ") for key in shown], lines * bool(shown)
