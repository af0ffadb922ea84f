"""Every script in benchmarks/ has a short form that runs, and compares two sides only if both have
computed the same; and pages get their measured tables from the files in benchmarks/results.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lorafold as lf
from lorafold.data.batches import num_targets
from lorafold.data.examples import encode
from lorafold.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "gpu")
# beside what tests are installed with
NEEDS = dict.fromkeys(("export_gguf", "export_matrix", "export_models"), "xllamacpp")
# of what others' packages deprecate among themselves nothing is said
WARNED = re.compile(r"Traceback|^(?!.*site-packages).*Warning: .*$", re.MULTILINE)
TABLE = re.compile(r"^\| ?-.*\n((?:\|.*\n?)+)", re.MULTILINE)


def run(script: Path, where: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A benchmark in its short form, in a folder."""
    command = [sys.executable, str(script), "--short", *options]
    return subprocess.run(command, cwd=where, text=True, capture_output=True, check=False)


def results() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (FOLDER / "results").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_short_form_runs_and_prints_figures(name: str, smollm2: Path, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    before = results()
    done = run(FOLDER / f"{name}.py", tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert WARNED.findall(said) == []
    rows = [row for table in TABLE.findall(done.stdout) for row in table.strip().splitlines()]
    assert rows, done.stdout[-4000:]
    assert any(re.search(r"\d", row) for row in rows)
    assert [row for row in rows if re.search(r"\bnan\b", row)] == []
    assert list(tmp_path.iterdir()) == []  # nothing stays where it was run,
    assert results() == before  # nor among what was measured


@pytest.mark.slow
def test_a_side_that_takes_more_steps_is_caught(smollm2: Path, tmp_path: Path) -> None:
    """It was not when `--epochs auto` made 100 steps of few rows, beside one epoch of TRL's."""
    text = (FOLDER / "chat.py").read_text(encoding="utf-8")
    assert text.count('"--epochs", "1", ') == 1
    script = tmp_path / "chat.py"
    setup = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n"
    script.write_text(setup + text.replace('"--epochs", "1", ', ""), encoding="utf-8")
    done = run(script, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "lorafold, bf16 and TRL + PEFT did not compute the same, so they are not compared:"
        " steps 100 and 2, rows 800 and 16, targets "
    )
    assert "speed-up" not in done.stdout


def test_unequal_work_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from lib.work import same_work

    one = {"steps": 16, "rows": 128, "targets": 1500}
    same_work({"lorafold": one, "TRL": dict(one)})
    for other in ({"steps": 100}, {"rows": 127}, {"targets": 1628}):
        ((name, count),) = other.items()
        with pytest.raises(SystemExit, match=rf"compared: {name} {one[name]:,} and {count:,}$"):
            same_work({"lorafold": one, "TRL": one | other})
    with pytest.raises(SystemExit, match="rows 0 and 0"):  # nothing is not the same as nothing
        same_work({"lorafold": one | {"rows": 0}, "TRL": one | {"rows": 0}})
    with pytest.raises(SystemExit, match="nothing was counted"):
        same_work({"lorafold": {}, "TRL": {}})


@pytest.mark.parametrize("packing", ["on", "off"])
def test_work_is_counted_where_it_is_computed(
    packing: str, tiny_model_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unestimated
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from lib.work import watched

    model = tiny_model_dir("llama")
    rows = [{"prompt": "Say a", "completion": "b" * n} for n in range(1, 7)]
    examples = encode(rows, load_tokenizer(model), 64).examples
    recipe = lf.Recipe(epochs=1, batch=2, accumulate=2, packing=packing, rank=2)
    with watched() as work:
        lf.train(recipe, model=model, data=rows, out=tmp_path / "adapter")
    assert work == {"steps": 3, "rows": 6, "targets": sum(map(num_targets, examples))}


MARK = re.compile(r"^<!-- generated: results (.+) -->$", re.MULTILINE)
PAGES = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")]
MARKS = [mark for text in PAGES for mark in MARK.findall(text)]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The code that makes the tables of pages."""
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("results")


def test_every_result_is_on_a_page(pages: ModuleType) -> None:
    named = {name for mark in MARKS for name in mark.split(" | ")[0].split()}
    assert named == {path.stem for path in (FOLDER / "results").glob("*.json")}
    for mark in MARKS:
        assert '<p class="source"' in pages.results(mark)


def test_measured_tables_are_not_written_by_hand() -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert re.findall(r"^ *\|.*", page, re.MULTILINE) == []
    assert re.findall(r"^\|.*benchmarks/\w+\.py.*", "\n".join(PAGES), re.MULTILINE) == []


def test_kept_results_become_a_table_and_incomplete_ones_fail(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from lib import results

    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "commit", lambda: "unknown")
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    results.keep("speed", [{"side": "a", "tokens/s": 3.14159}, {"side": "b"}], dtypes="bf16")
    table, source = pages.results("speed | tokens/s | side").split("\n\n")
    assert table == "| tokens/s | side |\n| --- | --- |\n| 3.14 | a |\n|  | b |"
    assert "bf16; torch " in source
    assert "unknown" not in source
    (run,) = json.loads((tmp_path / "speed.json").read_text())
    lacking = [run | {"dtypes": ""}, run | {"tables": []}]
    lacking += [{k: v for k, v in run.items() if k != "command"}]
    lacking += [run | {"tables": [{"columns": ["side"], "rows": [["a", "1"]]}]}]
    for other in lacking:
        (tmp_path / "other.json").write_text(json.dumps([run, other]))
        with pytest.raises(pages.PluginError, match=r"a run of other\.json lacks"):
            pages.results("other")
    with pytest.raises(pages.PluginError, match=r"there is no benchmarks/results/none\.json"):
        pages.results("none")
    with pytest.raises(pages.PluginError, match=r"no table of speed\.json has"):
        pages.results("speed | seconds")


def day(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_a_part_runs_on_tensors_that_say_cuda(tmp_path: Path) -> None:
    done = day(tmp_path / "found.h100", "--dry-run", "--only", " launches,launches")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.h100.json").read_text())
    (row,) = found["parts"]["launches"]["rows"]
    assert row["launches a block"] == row["budget"]
    assert sum(row["waits"].values()) == 1
    text = (tmp_path / "found.h100.md").read_text()
    assert text.startswith("# A dry run without a GPU")
    assert f"| {row['run']} | {row['budget']} |" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.h100.json", "found.h100.md"]


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = day(tmp_path / "found")
    assert done.returncode == 2
    assert "found no GPU that torch can use; --dry-run needs none" in done.stderr
    done = day(tmp_path / "found", "--dry-run", "--only", "speeed")
    assert done.returncode == 2
    assert "found speeed, expected of values, launches" in done.stderr
    done = day(tmp_path / "nowhere" / "found", "--dry-run")
    assert done.returncode == 2
    assert "can't be written (No such file or directory)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    done = day(tmp_path / "found", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert len(parts) == 6
    assert all(part["rows"] for part in parts.values())
