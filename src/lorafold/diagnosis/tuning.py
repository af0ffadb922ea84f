"""The environment of the process, which the commands that train begin again with if it lacks
something (`lorafold.machine.tuning`).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping

from lorafold.diagnosis.finding import Finding
from lorafold.machine.tuning import SWITCH, WISHES, huge_pages, wishes

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def findings() -> Iterator[Finding]:
    """The environment of training processes, huge pages and threads."""
    missing = wishes()
    shown = ", ".join(f"{name}={value}" for name, value in missing.items())
    if os.environ.get(SWITCH) == "off":
        text = f"off: {SWITCH}=off, so commands that train begin once and leave it alone"
    elif platform.libc_ver()[0] != "glibc":
        text = "nothing to set: it takes glibc"
    elif missing:
        text = f"commands that train begin again with {shown}"
    else:
        text = "complete: commands that train begin once"
    value = {"would_set": missing, "set": {n: os.environ[n] for n in WISHES if n in os.environ}}
    yield Finding("environment", text, value)
    pages = huge_pages()
    yield Finding("huge pages", pages or "the system does not say", pages or "")
    threads = set_threads()
    text = ", ".join(f"{name}={value}" for name, value in threads.items())
    yield Finding("threads", text or "not set: torch takes one a core", threads)


def set_threads(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that say how many threads are used, where they are set."""
    return {name: environment[name] for name in THREADS if name in environment}


def switched_off() -> bool:
    """Is the tuning of training processes switched off?"""
    return os.environ.get(SWITCH) == "off"
