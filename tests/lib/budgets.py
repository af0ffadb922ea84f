"""The CPU seconds that the tests of a folder take, printed at the end of a run beside what the
folder's fast ones are meant to take. Nothing fails of it: machines differ.

Counted are user and system seconds of the process that runs a test, in whichever worker of xdist,
and of the processes that it started and waited for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

# In the order in which they run: house has the longest file, the pages of the documentation;
# algebra has many short ones, and lets the workers end together.
BUDGETS = {
    "house": 55,
    "train": 125,
    "serve": 95,
    "files": 115,
    "studies": 60,
    "export": 35,
    "objectives": 80,
    "data": 35,
    "engine": 65,
    "face": 30,
    "algebra": 80,
    "devices": 80,
}
_took: Counter[str] = Counter()
_began = 0.0


def _now() -> float:
    return sum(os.times()[:4])


def _folder(nodeid: str) -> str:
    return (*nodeid.split("/"), "")[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {folder: i for i, folder in enumerate(BUDGETS)}
    items.sort(key=lambda item: order.get(_folder(item.nodeid), len(order)))


def pytest_runtest_logstart() -> None:
    global _began
    _began = _now()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Each report, of which a test has three, goes from the worker with its share of seconds."""
    global _began
    report: Any = yield
    report.cpu_seconds, _began = _now() - _began, _now()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "slow" not in report.keywords:
        spent = getattr(report, "cpu_seconds", 0.0)  # a worker that crashed sent none
        _took[_folder(report.nodeid)] += spent


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for folder, seconds in _took.items():
        terminalreporter.line(
            f"{folder:<10} fast tests: {seconds:6.1f} CPU seconds of {BUDGETS.get(folder, 0)}"
        )
