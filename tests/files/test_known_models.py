"""Every family of docs/models.md through every step, as its row says, and the page has them all."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest

from matrix import HEAD, PAGE, line, measured, on_page
from more_architectures import FAMILIES


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_step_is_as_the_page_says(name: str, tmp_path: Path) -> None:
    assert line(astuple(measured(name, tmp_path))) == on_page()[name]


def test_the_page_has_each_family_and_its_class() -> None:
    assert line(HEAD) in PAGE.read_text(encoding="utf-8")
    rows = {name: found.split(" | ") for name, found in on_page().items()}
    assert list(rows) == sorted(FAMILIES)
    classes = {name: f"`{row.cls.__name__}`" for name, row in FAMILIES.items()}
    assert {name: cells[1] for name, cells in rows.items()} == classes
    assert {len(cells) for cells in rows.values()} == {len(HEAD)}
