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

# on two cores of 2.5 GHz
BUDGETS = {
    "algebra": 200,
    "data": 60,
    "engine": 60,
    "face": 40,
    "files": 100,
    "house": 60,
    "objectives": 40,
    "serve": 100,
    "studies": 60,
    "train": 100,
}
_took: Counter[str] = Counter()
_began = 0.0


def _now() -> float:
    return sum(os.times()[:4])


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
        _took[report.nodeid.split("/")[1]] += report.cpu_seconds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for folder, seconds in sorted(_took.items()):
        terminalreporter.line(
            f"{folder:<10} fast tests: {seconds:6.1f} CPU seconds of {BUDGETS.get(folder, 0)}"
        )
