"""The options that choose tests, in a directory of their own: three slow tests and one fast one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import selection

TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("case", range(20))
def test_slow(case): pass

@pytest.mark.few(3)
@pytest.mark.parametrize("case", range(10))
def test_cases(case): pass

def test_fast(): pass
"""
FILE = "test_some.py"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copy(selection.__file__, tmp_path)
    (tmp_path / "seconds.json").write_text(
        json.dumps({f"{FILE}::test_slow": 2.0, f"{FILE}::test_cases": 1.0})
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    few\n")
    (tmp_path / FILE).write_text(TESTS)
    return tmp_path


def run(directory: Path, *options: str, cases: str = "a") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "selection", "-v", *options],
        cwd=directory,
        env=os.environ
        | {"CASES": cases, "PYTHONPATH": str(directory), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout


def passed(directory: Path, *options: str, cases: str = "a") -> list[str]:
    lines = run(directory, *options, cases=cases).splitlines()
    return [line.split()[0].partition("::")[2] for line in lines if " PASSED" in line]


def test_a_commit_chooses_its_cases(directory: Path) -> None:
    fast = passed(directory, "-m", "not slow")
    assert len(fast) == 4  # three cases of ten
    assert "test_fast" in fast
    assert passed(directory, "-m", "not slow") == fast
    assert passed(directory, "-m", "not slow", cases="b") != fast
    assert len(passed(directory)) == 31


def test_slow_tests_are_chosen_by_the_seconds_that_they_take(directory: Path) -> None:
    chosen = passed(directory, "--slow", "9")
    slow = [test for test in chosen if test.startswith("test_slow")]
    cases = [test for test in chosen if test.startswith("test_cases")]
    assert 8 <= 2 * len(slow) + len(cases) - 3 <= 9
    assert passed(directory, "--slow", "9") == chosen
    assert passed(directory, "--slow", "9", cases="b") != chosen
    assert len(passed(directory, "--slow", "0")) == 4


def test_a_test_that_would_hold_up_a_worker_is_in_no_slice(directory: Path) -> None:
    longer = {f"{FILE}::test_slow": selection.LONGEST + 1, f"{FILE}::test_cases": 1.0}
    (directory / "seconds.json").write_text(json.dumps(longer))
    assert len(passed(directory, "--slow", "1000")) == 11


def test_seconds_are_written_and_others_kept(directory: Path) -> None:
    (directory / "seconds.json").write_text(json.dumps({"test_other.py::test": 3.0}))
    passed(directory, "--write-seconds")
    found = json.loads((directory / "seconds.json").read_text())
    assert found.keys() == {"test_other.py::test", f"{FILE}::test_slow", f"{FILE}::test_cases"}
    assert found["test_other.py::test"] == 3.0


def test_what_has_not_passed_for_longest_is_printed(directory: Path) -> None:
    passed(directory)
    cache = directory / ".pytest_cache" / "v" / selection.RECORD
    record = json.loads(cache.read_text())
    assert len(record) == 31
    record[f"{FILE}::test_slow[7]"] = "2020-01-02"
    record[f"{FILE}::test_gone"] = ""
    cache.write_text(json.dumps(record))
    (directory / FILE).write_text(TESTS.replace("(case): pass", "(case): assert case != 7", 1))
    oldest = run(directory, "--oldest").partition("for the longest time:\n")[2].splitlines()
    assert oldest[0].split() == ["2020-01-02", f"{FILE}::test_slow[7]"]
    assert not any("test_gone" in line for line in oldest)
