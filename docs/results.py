"""Tables of measured figures, from the files of `benchmarks/results`.

    <!-- generated: results experts mixture -->               all tables of two files
    <!-- generated: results ranks | rank | seed | loss -->    the tables that have these columns

A caption below the tables of a run names their source without the fields that are "unknown". The
build fails for results that are missing or incomplete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

FOLDER = Path(__file__).parent.parent / "benchmarks" / "results"
# The fields of a run as its caption has them. Tables whose rows differ have a column instead.
FIELDS = {
    "processor": "{}",
    "cores": "{} cores",
    "threads": "threads: {}",
    "dtypes": "dtypes: {}",
    "versions": "{}",
    "date": "{}",
    "commit": "commit {}",
    "command": "`{}`",
}


def results(mark: str) -> str:
    """The tables that a mark names, with their sources, in Markdown."""
    names, *columns = mark.split(" | ")
    return "\n\n".join(of_file(name, columns) for name in names.split())


def of_file(name: str, columns: list[str]) -> str:
    """The tables of a file that have these columns, or all of them."""
    file = FOLDER / f"{name}.json"
    if not file.is_file():
        raise PluginError(f"results {name}: there is no benchmarks/results/{name}.json")
    parts = []
    for run in json.loads(file.read_text(encoding="utf-8")):
        if lacks := missing(run):
            raise PluginError(f"results {name}: a run of {name}.json lacks {', '.join(lacks)}")
        tables = [table for table in run["tables"] if {*columns} <= {*table["columns"]}]
        parts += [shown(table, columns or table["columns"]) for table in tables]
        parts += [caption(run)] * bool(tables)
    if not parts:
        raise PluginError(f"results {name}: no table of {name}.json has the columns {columns}")
    return "\n\n".join(parts)


def missing(run: dict[str, Any]) -> list[str]:
    """The fields that a run lacks, and "complete rows" if a table has none or a row lacks cells."""
    tables = run.get("tables") or [{"columns": [], "rows": []}]
    in_rows = set.intersection(*(set(table["columns"]) for table in tables))
    whole = all(
        t["rows"] and {len(row) for row in t["rows"]} == {len(t["columns"])} for t in tables
    )
    lacks = [field for field in FIELDS if not run.get(field) and field not in in_rows]
    return lacks + ["complete rows"] * (not whole)


def shown(table: dict[str, Any], columns: list[str]) -> str:
    """Columns of a table."""
    at = [table["columns"].index(column) for column in columns]
    cells = [["" if row[i] == "unknown" else row[i] for i in at] for row in table["rows"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(at), *cells])


def caption(run: dict[str, Any]) -> str:
    """The source of the figures of a run."""
    known = {name: v.partition("+")[0] for name, v in run["versions"].items() if v != "unknown"}
    fields = run | {"versions": ", ".join(map(" ".join, known.items())) or "unknown"}
    words = [
        form.format(fields[field])
        for field, form in FIELDS.items()
        if fields.get(field, "unknown") != "unknown"
    ]
    text = "; ".join(words).replace("(R)", "")
    return f'<p class="source" markdown>{text}. {run.get("notes", "")}</p>'
