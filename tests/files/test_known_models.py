"""Every family of docs/models.md through every step, as its line says; the page has them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from matrix import measured, on_page
from more_architectures import FAMILIES


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_step_is_as_the_page_says(name: str, tmp_path: Path) -> None:
    found = measured(name, tmp_path)
    assert (found.trained, str(found)) == on_page()[name]


def test_the_page_has_each_family_and_its_class() -> None:
    lines = {name: line for name, (_, line) in on_page().items()}
    assert lines.keys() == FAMILIES.keys()
    assert [n for n, row in FAMILIES.items() if f"`{row.cls.__name__}`" not in lines[n]] == []
