"""Which tests run, and when each last ran.

    few(n)             a mark: n cases of a test are fast, the others slow
    --slow SECONDS     run only as many slow tests as take so many CPU seconds (default: all)

Both choices follow from a hash of the case and the commit, so every commit runs different cases,
and everyone who checks it out runs the same ones. `CASES=<commit>` in the environment repeats the
choice of another commit. What a slow test takes is in `seconds.json`, by test;
`--write-seconds` writes it anew from the tests that ran.

pytest's cache records when each test last passed; `--oldest` prints those of longest ago.
"""

import json
import os
import subprocess
from collections import defaultdict
from datetime import date
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

SECONDS = Path(__file__).with_name("seconds.json")
UNKNOWN = 10.0  # CPU seconds of a slow test that the file does not have
LEAST = 0.1  # of a case, with what surrounds it
LONGEST = 50.0  # of a test that may be in a slice: the workers share files, and one waits for it
SHOWN = 10
RECORD = "lorafold/last_passed"
_passed: dict[str, str] = {}
_seconds: dict[str, list[float]] = defaultdict(list)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", type=float, metavar="SECONDS", help="of the slow tests, run so many")
    parser.addoption("--oldest", action="store_true", help="print what has not passed for longest")
    parser.addoption("--write-seconds", action="store_true", help=f"write {SECONDS.name}")


def pytest_configure(config: pytest.Config) -> None:
    """The commit is asked for once: the workers of xdist inherit the environment."""
    if "CASES" not in os.environ:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=config.rootpath, capture_output=True, text=True, check=False,
        )  # fmt: skip
        os.environ["CASES"] = head.stdout.strip()


def pytest_report_header() -> str:
    return f"cases: chosen for CASES={os.environ['CASES']}"


def order(item: pytest.Item) -> bytes:
    return sha256(f"{os.environ['CASES']} {item.nodeid}".encode()).digest()


def test_of(nodeid: str) -> str:
    """The test of a case, without its parameters."""
    return nodeid.partition("[")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases[test_of(item.nodeid)].append(item)
    for alike in cases.values():
        (n,) = alike[0].get_closest_marker("few").args  # type: ignore[union-attr]
        for item in sorted(alike, key=order)[n:]:
            item.add_marker(pytest.mark.slow)
    if (room := config.getoption("slow")) is None:
        return
    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    chosen = set[str]()
    for item in sorted((one for one in items if one.get_closest_marker("slow")), key=order):
        takes = max(LEAST, seconds.get(test_of(item.nodeid), UNKNOWN))
        if takes <= min(room, LONGEST):
            chosen.add(item.nodeid)
            room -= takes
    left = [one for one in items if one.get_closest_marker("slow") and one.nodeid not in chosen]
    config.hook.pytest_deselected(items=left)
    without = {id(one) for one in left}
    items[:] = [one for one in items if id(one) not in without]


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "setup":
        _passed.setdefault(report.nodeid, "")
    if report.when == "call" and report.passed:
        _passed[report.nodeid] = date.today().isoformat()
    if "slow" in report.keywords:
        _seconds[report.nodeid].append(getattr(report, "cpu_seconds", 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if config.getoption("write_seconds"):
        each: dict[str, list[float]] = defaultdict(list)
        for nodeid, parts in _seconds.items():
            each[test_of(nodeid)].append(sum(parts))
        found = json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {}
        found |= {test: round(fmean(took), 1) for test, took in each.items()}
        SECONDS.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    if (cache := getattr(config, "cache", None)) is None:
        return
    record = cache.get(RECORD, {})
    record |= {nodeid: day or record.get(nodeid, "") for nodeid, day in _passed.items()}
    if config.getoption("oldest"):
        files = {nodeid.partition("::")[0] for nodeid in _passed}
        gone = {n for n in record if n.partition("::")[0] in files and n not in _passed}
        record = {nodeid: day for nodeid, day in record.items() if nodeid not in gone}
    cache.set(RECORD, record)
    if config.getoption("oldest"):
        terminalreporter.line("tests that have not passed for the longest time:")
        for nodeid in sorted(record, key=record.__getitem__)[:SHOWN]:
            terminalreporter.line(f"  {record[nodeid] or 'never':<10}  {nodeid}")
