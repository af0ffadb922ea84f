"""Results and runs as a notebook shows them."""

import importlib
import inspect
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from adapter_cases import make_adapter
from imports import FILES, name_of
from lorafold.evaluation import Evaluation
from lorafold.evaluation.loss_and_exact_match import Answer
from lorafold.files.html_page import ShownInNotebooks
from lorafold.inspecting.resize import Resized

# completions, a conversation, and what serves until it ends
OTHERWISE = {"generate", "chat", "serve", "preview"}


class Table(HTMLParser):
    """The texts of the cells, and the attributes of all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.attributes: set[tuple[str, str | None]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"div", "table", "thead", "tbody", "tr", "td", "th"}
        self.attributes |= {*attrs}
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def shown(result: Any) -> dict[str, str]:
    """The cells of a result's first table by the cell before each."""
    table = Table(result._repr_html_())
    assert table.attributes <= {("class", "wide")}
    return dict(zip(table.cells, table.cells[1:], strict=False))


def test_every_verb_returns_what_a_notebook_shows() -> None:
    for path in FILES:
        if (name := name_of(path)) not in ("", "__main__"):
            importlib.import_module(f"lorafold.{name}")
    known = {kind.__name__ for kind in ShownInNotebooks.__subclasses__()}
    face = "lorafold.api."
    verbs = {n for n in dir(lf) if n.islower() and getattr(lf, n).__module__.startswith(face)}
    for verb in verbs - OTHERWISE - {"load", "load_model"}:
        kinds = inspect.signature(getattr(lf, verb)).return_annotation
        assert {*re.findall(r"(\w+)(?: \||$)", kinds)} <= known, verb


def test_what_stands_in_it_is_text() -> None:
    hostile = "<b onclick=x>&amp;</b>"
    answers = (Answer("a", "b", "c"),)
    measured = Evaluation(0.5, (0.25, 1e3), 0.75, None, 1234, answers)
    assert shown(measured) | {"loss": "0.5 (95%: 0.25 to 1000)", "n": "1,234"} == shown(measured)
    assert shown(Resized({}, 0.5, hostile, {}))["out"] == hostile


@pytest.mark.usefixtures("unestimated")
def test_a_run_and_its_adapter_are_shown_in_a_few_lines(tiny_model_dir, tmp_path: Path) -> None:
    base = tiny_model_dir("llama")
    recipe = lf.Recipe(steps=6, batch=1, storage="fp32")
    rows = [{"prompt": "a", "completion": "b"}]
    trained = lf.train(recipe, model=base, data=rows, out=tmp_path / "a", device="cpu")
    assert shown(trained)["adapter"] == str(tmp_path / "a")
    assert shown(trained)["losses"].endswith(" (6)")
    make_adapter(base, tmp_path / "b")
    for one in (trained, lf.history(tmp_path / "a"), lf.inspect(tmp_path / "b", base)):
        assert 3 < one._repr_html_().count("<tr>") <= 40


ASKED = """\
import lorafold as lf
rows = [{"prompt": "a", "completion": "b"}]
recipe = lf.Recipe(steps=300, batch=1, storage="fp32", eval_fraction=0.0)
"""
ROWS = [{"prompt": "a", "completion": "b"}]
SHORT = lf.Recipe(steps=2, batch=1, storage="fp32")


@pytest.mark.slow
def test_a_run_in_a_notebook_is_a_few_lines_and_one_bar(tiny_model_dir, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    given = f"data=rows, model={str(tiny_model_dir('llama'))!r}, device='cpu'"
    given_b = f"out='b', console=False, {given}"
    cells = [ASKED, f"lf.train(recipe, out='a', {given})", f"lf.train(recipe, {given_b})"]
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(text) for text in cells]
    context = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=context).execute()
    told, silent = (cell.outputs for cell in notebook.cells[1:])
    pages = [one["data"].get("text/html", "") for one in told if "data" in one]
    bars = [page for page in pages if "<progress" in page]
    assert all('value="300" max="300"' in page for page in bars)
    assert len(bars) == 1
    assert "<table>" in pages[-1]
    assert len(told) < 25
    # rich's warning; tqdm's own names it too, where transformers is imported
    assert not any('install "ipywidgets"' in str(one) for one in told)
    assert [one["output_type"] for one in silent] == ["execute_result"]


@pytest.mark.usefixtures("unestimated")
def test_a_run_on_a_terminal_shows_a_bar_unless_told_not_to(
    tiny_model_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, terminal = os.openpty()
    os.set_blocking(ours, False)
    given = {"model": tiny_model_dir("llama"), "data": ROWS, "device": "cpu"}
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        lf.train(SHORT, out=tmp_path / "a", console=False, **given)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
        lf.train(SHORT, out=tmp_path / "b", **given)
        said = os.read(ours, 1 << 20).decode()
    os.close(ours)
    assert "2/2" in said
    assert "tokens/s" in said


@pytest.mark.usefixtures("unestimated")
def test_a_run_in_a_pipe_prints_nothing(tiny_model_dir, tmp_path: Path, capfd) -> None:
    lf.train(SHORT, model=tiny_model_dir("llama"), data=ROWS, out=tmp_path / "a", device="cpu")
    assert "step" not in "".join(capfd.readouterr())
