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
    told = re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", capsys.readouterr().out)
    first, last = map(float, told.groups())
    assert last < 0.5 * first


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_was_learned(smollm2: Path, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "first.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # shown where it is run
    context = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=context).execute()
    cells = [cell for cell in notebook.cells if cell.source.startswith("lf.generate")]
    before, after = (cell.outputs[-1]["data"]["text/plain"] for cell in cells)
    assert "Ask Tomas." not in before
    assert "Ask Tomas." in after
    assert (tmp_path / "merged" / "config.json").exists()
