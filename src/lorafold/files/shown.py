"""A result in a notebook: its figures as tables without styles, so that they have the notebook's
own colours, dark ones too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lorafold.errors import cut
from lorafold.files.card import within
from lorafold.files.page import html_table

LINES = 30  # of a table, at most
ENTRIES = 16  # of a mapping whose entries are shown, at most
INTERVAL = "_interval"


class Shown:
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
