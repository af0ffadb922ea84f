"""Speeds up a process with environment variables, and by excluding objects from garbage collection.

`restart_tuned` restarts the process with variables that libraries only read at start-up (huge pages
for the heap, fewer cached matmul kernels of 0.7 MB each); LORAFOLD_TUNE=off disables this. torch
and transformers create a million objects that are never garbage, which full collections traverse;
`gc.freeze` excludes them. Excluded garbage is never freed, so `imports_frozen` is for processes
with a single task.
"""

import _thread
import gc
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SWITCH = "LORAFOLD_TUNE"
VARIABLES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
REPEAT_SECONDS = 0.02  # seconds until the interrupt is repeated
MODULE_GROWTH = 1.1  # growth of the number of modules that triggers another freeze


def unset_variables() -> dict[str, str]:
    if os.environ.get(SWITCH) == "off" or platform.libc_ver()[0] != "glibc":
        return {}
    pages = HUGE_PAGES if huge_pages() == "madvise" else {}
    return {name: value for name, value in (VARIABLES | pages).items() if name not in os.environ}


def huge_pages() -> str | None:
    """The kernel's setting for transparent huge pages: always, madvise, never, or None."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return chosen and chosen[1]


def restart_tuned() -> None:
    """Restarts this process with the same arguments if a variable is missing. Call it before
    anything else.
    """
    if missing := unset_variables():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until `cli.main` can handle it
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


@contextmanager
def imports_frozen() -> Iterator[None]:
    """Context that excludes objects of imported modules from garbage collection, during the block
    and once at its end.
    """
    modules = len(sys.modules)

    def before(phase: str, about: Mapping[str, int]) -> None:
        nonlocal modules
        full = phase == "start" and about["generation"] == 2
        if full and len(sys.modules) > MODULE_GROWTH * modules:
            modules = len(sys.modules)
            gc.freeze()

    gc.callbacks.append(before)
    try:
        with _interrupts_repeated():
            yield
    finally:
        gc.callbacks.remove(before)
        gc.freeze()


@contextmanager
def _interrupts_repeated() -> Iterator[None]:
    """Context that repeats a Ctrl-C that arrives in a callback of the garbage collector. Python
    only prints the exception there, and imports trigger these callbacks all the time.
    """
    usual = sys.unraisablehook

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(REPEAT_SECONDS, _thread.interrupt_main).start()
        else:
            usual(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


@contextmanager
def all_frozen() -> Iterator[None]:
    """Collects once, and freezes all objects until the block ends, because a full collection of a
    server's objects would stop its threads for 0.3 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def existing_frozen() -> Iterator[None]:
    """Freezes existing objects until the block ends, because with torch imported each collection
    would take 0.15 s. Does nothing if a command has already frozen objects.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
