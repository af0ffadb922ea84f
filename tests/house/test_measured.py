"""What stands on a page is what was measured: a table below a mark has figures of that file.

    <!-- results: ranks -->     the table that follows is from benchmarks/results/ranks.md

Each figure beyond the first column is one of the file's, rounded as the page has it; shares may be
written as percent in one of both. So a result that is measured again makes the page's test fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"^<!-- results: (\w+) -->\n+((?:\|.*\n?)+)", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def marked() -> Iterator[tuple[str, str, str]]:
    """Page, name of the results, table."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for found in MARKED.finditer(page.read_text(encoding="utf-8")):
            yield str(page.relative_to(ROOT / "docs")), found[1], found[2]


TABLES = list(marked())


def figures(text: str) -> list[tuple[float, float]]:
    """The numbers of a text, each with half a unit of its last digit."""
    found = []
    for number in NUMBER.findall(text.replace("±", " ")):
        plain = number.replace(",", "")
        mantissa, _, power = plain.partition("e")
        digits = len(mantissa.partition(".")[2])
        found.append((float(plain), 0.5 * 10.0 ** (int(power or 0) - digits)))
    return found


def beyond_the_first_column(table: str) -> str:
    """The cells of the body without those that name the rows."""
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return " | ".join(cell for row in rows for cell in row[1:])


def foreign(table: str, results: str) -> list[float]:
    """The figures of a page's table that are none of the results, rounded."""
    known = [value for value, _ in figures(results)]
    known += [100 * value for value in known if abs(value) < 2]  # shares as percent
    return [
        value
        for value, half in figures(beyond_the_first_column(table))
        if not any(abs(value - other) <= 1.001 * half for other in known)
    ]


@pytest.mark.parametrize(
    ("page", "name", "table"), TABLES, ids=[f"{p}-{n}-{i}" for i, (p, n, _) in enumerate(TABLES)]
)
def test_a_page_has_the_figures_that_were_measured(page: str, name: str, table: str) -> None:
    assert foreign(table, (RESULTS / f"{name}.md").read_text(encoding="utf-8")) == []


def test_a_figure_that_differs_is_found() -> None:
    table = "| rank | loss | exact |\n|---|---|---|\n| 4 | 0.0059, 0.0076 | 97% |\n"
    assert foreign(table, "| 4 | 0.0059 | 0.97 |\n| 4 | 0.00764 | |\n") == []
    assert foreign(table, "| 4 | 0.0059 | 0.96 |\n| 4 | 0.0081 | |\n") == [0.0076, 97.0]


def test_the_pages_of_measurements_are_marked() -> None:
    pages = {page for page, _, _ in TABLES}
    assert pages >= {"measured.md", "measured-methods.md", "memory.md", "inspect.md", "fits.md"}
