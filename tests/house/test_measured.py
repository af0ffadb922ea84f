"""What stands on a page is what was measured: a table below a mark has figures of that file.

    <!-- results: ranks -->     the table that follows is from benchmarks/results/ranks.json

Each figure beyond the first column is one of the file's, rounded as the page has it; shares may be
written as percent in one of both. So is each of a row that names `benchmarks/ranks.py` as where its
figures are from. A result that is measured again makes the page's test fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"^<!-- results: (\w+) -->\n+((?:\|.*\n?)+)", re.MULTILINE)
FROM = re.compile(r"^\|.*`benchmarks/(\w+)\.py.*$", re.MULTILINE)
NAMES = {"policy_task": ("policy_lists", "policy_chain_sum")}  # files not named as the benchmark
ASIDE = re.compile(r"`[^`]*`|\]\([^)]*\)|95%:")  # commands, links, what all intervals are of
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def marked() -> Iterator[tuple[str, str, str]]:
    """Page, name of the results, table."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for found in MARKED.finditer(page.read_text(encoding="utf-8")):
            yield str(page.relative_to(ROOT / "docs")), found[1], found[2]


def named() -> Iterator[tuple[str, str, str]]:
    """Page, name of the results, row that names the benchmark they are from."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for found in FROM.finditer(MARKED.sub("", page.read_text(encoding="utf-8"))):
            files = [RESULTS / f"{name}.json" for name in NAMES.get(found[1], (found[1],))]
            if all(file.exists() for file in files):
                yield str(page.relative_to(ROOT / "docs")), found[1], found[0]


TABLES, ROWS = list(marked()), list(named())
# results that stand on the page alone, of commands whose own output was not kept
COPIED = {
    result
    for run in json.loads((RESULTS / "measured.json").read_text(encoding="utf-8"))
    for table in run["tables"]
    for _, result in table["rows"]
}


def figures(text: str) -> list[tuple[float, float]]:
    """The numbers of a text, each with half a unit of its last digit."""
    found = []
    for number in NUMBER.findall(text.replace("±", " ")):
        plain = number.replace(",", "")
        mantissa, _, power = plain.partition("e")
        digits = len(mantissa.partition(".")[2])
        found.append((float(plain), 0.5 * 10.0 ** (int(power or 0) - digits)))
    return found


def foreign(rows: str, results: str) -> list[float]:
    """The figures of a page's rows, beyond their first column, that are none of the results."""
    cells = " | ".join(row.strip("|").partition("|")[2] for row in rows.splitlines())
    known = [value for value, _ in figures(results)]
    known += [100 * value for value in known if abs(value) < 2]  # shares as percent
    return [
        value
        for value, half in figures(cells)
        if not any(abs(value - other) <= 1.001 * half for other in known)
    ]


@pytest.mark.parametrize(
    ("page", "name", "table"), TABLES, ids=[f"{p}-{n}-{i}" for i, (p, n, _) in enumerate(TABLES)]
)
def test_a_page_has_the_figures_that_were_measured(page: str, name: str, table: str) -> None:
    body = table.split("\n", 2)[2]
    assert foreign(body, (RESULTS / f"{name}.json").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("page", "name", "row"), ROWS, ids=[f"{p}-{n}-{i}" for i, (p, n, _) in enumerate(ROWS)]
)
def test_a_row_has_the_figures_of_the_benchmark_it_names(page: str, name: str, row: str) -> None:
    files = [RESULTS / f"{file}.json" for file in NAMES.get(name, (name,))]
    results = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert row.split(" | ")[1] in COPIED or foreign(ASIDE.sub("", row), results) == []


def test_every_row_of_the_page_of_measurements_has_a_result() -> None:
    """Of a table's file, of the benchmark that a row names, or of measured.json with other rows."""
    page = MARKED.sub("", (ROOT / "docs" / "measured.md").read_text(encoding="utf-8"))
    rows = re.findall(r"(?<!\n\n)^\| (?!---)(.*) \|$", page, re.MULTILINE)
    named = {row.strip("| ") for _, _, row in ROWS}
    assert len(rows) > 20
    assert [row for row in rows if row not in named and row.split(" | ")[1] not in COPIED] == []


def test_a_figure_that_differs_is_found() -> None:
    table = "| 4 | 0.0059, 0.0076 | 97% |\n"
    assert foreign(table, "| 4 | 0.0059 | 0.97 |\n| 4 | 0.00764 | |\n") == []
    assert foreign(table, "| 4 | 0.0059 | 0.96 |\n| 4 | 0.0081 | |\n") == [0.0076, 97.0]


def test_the_pages_of_measurements_are_marked() -> None:
    pages = {page for page, _, _ in TABLES}
    assert pages >= {"measured.md", "memory.md", "inspect.md", "faq.md", "fragility.md"}
    assert {name for _, name, _ in ROWS} >= {
        "alignment",
        "memory_grid",
        "nf4_training",
        "policy_task",
        "preferences",
        "serving",
    }
