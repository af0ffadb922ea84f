"""Makes a process faster: it restarts with other environment variables, and keeps Python's garbage
collector away from what it has imported.

`restart_tuned` sets variables that libraries read only when a process starts (huge pages for the
heap, fewer cached matmul kernels, of 0.7 MB each). A variable that is set stays as it is, and with
LORAFOLD_TUNE=off nothing is changed. SmolLM2-135M on two cores: huge pages take 0.88 of the time,
and the process takes a constant 1.57 GB instead of growing by 30 MB a step.

    with imports_set_aside(): ...       for a command: modules are set aside as they come
    with existing_set_aside(): ...      for a block that collects often: all that exists before it
    with all_set_aside(): ...           for a server: all that exists once it listens

torch and transformers are a million objects, none of which is ever garbage, and a full collection
goes through all of them: 1.5 s of CPU time of `lorafold train`. `gc.freeze` sets them aside.
Garbage that is set aside stays until the process ends, so `imports_set_aside` is for a process that
does one thing.
"""

import _thread
import gc
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SWITCH = "LORAFOLD_TUNE"
WISHES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SOON = 0.02  # seconds, after which what interrupted is done with
MANY = 1.1  # times the modules that there were; a module or two are imported at any time


def wishes() -> dict[str, str]:
    """The variables, with their values, that this process should have and does not."""
    if os.environ.get(SWITCH) == "off" or platform.libc_ver()[0] != "glibc":
        return {}
    pages = HUGE_PAGES if huge_pages() == "madvise" else {}
    return {name: value for name, value in (WISHES | pages).items() if name not in os.environ}


def huge_pages() -> str | None:
    """The kernel's setting for huge pages: always, madvise or never; None if there is none."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return chosen and chosen[1]


def restart_tuned() -> None:
    """Restart this process with the same arguments if a variable is missing.

    Call it before the process has done anything.
    """
    if missing := wishes():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


@contextmanager
def imports_set_aside() -> Iterator[None]:
    """Set the objects of imported modules aside, as long as the block runs and once when it ends.
    """
    modules = len(sys.modules)

    def before(phase: str, about: Mapping[str, int]) -> None:
        nonlocal modules
        full = phase == "start" and about["generation"] == 2
        if full and len(sys.modules) > MANY * modules:
            modules = len(sys.modules)
            gc.freeze()

    gc.callbacks.append(before)
    try:
        with _interrupts_kept():
            yield
    finally:
        gc.callbacks.remove(before)
        gc.freeze()


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Interrupt again, soon, where Ctrl-C came while a callback of the collector ran: Python tells
    such an exception and goes on, and while it imports those callbacks are called all the time.
    """
    usual = sys.unraisablehook

    def kept(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(SOON, _thread.interrupt_main).start()
        else:
            usual(lost)

    sys.unraisablehook = kept
    try:
        yield
    finally:
        sys.unraisablehook = usual


@contextmanager
def all_set_aside() -> Iterator[None]:
    """Collect once, and set the rest aside until the block ends: a full collection of a server's
    objects would stop its threads for 0.3 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def existing_set_aside() -> Iterator[None]:
    """Set the objects that exist aside until the block ends: where torch is imported, a collection
    would take 0.15 s for them. Where a command has set objects aside already, these are enough.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
