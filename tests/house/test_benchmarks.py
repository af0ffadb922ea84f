"""Every script in benchmarks/ has a short form that runs, and compares two sides only if both have
computed the same; and pages have the figures of the files of results.

    <!-- results: ranks -->     the table that follows is from benchmarks/results/ranks.json

Each figure beyond the first column is one of the file's, rounded as the page has it; shares may be
percent in one of both. So is each of a row that names `benchmarks/ranks.py`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafold as lf
from lorafold.data.batches import labelled
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
    assert [row for row in rows if "nan" in row] == []
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
    assert "times as fast" not in done.stdout


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
    assert work == {"steps": 3, "rows": 6, "targets": sum(map(labelled, examples))}


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
    named = {"alignment", "memory_grid", "nf4_training", "policy_task", "preferences", "serving"}
    assert {name for _, name, _ in ROWS} >= named


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
