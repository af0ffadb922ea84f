"""The examples run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    first, last = map(
        float,
        re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", capsys.readouterr().out).groups(),
    )
    assert last < 0.5 * first
