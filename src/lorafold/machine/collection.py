"""Keeps Python's garbage collector away from what a process has imported.

    with imports_set_aside(): ...       for a command: modules are set aside as they come
    with existing_set_aside(): ...      for a block that collects often: all that exists before it
    with all_set_aside(): ...           for a server: all that exists once it listens

torch and transformers are a million objects in 3300 modules, none of which is ever garbage. A full
collection goes through all of them, and the process makes 13 of those while it imports, others
while it works, and one when it ends. Here the objects are set aside (`gc.freeze`) instead: before a
full collection that follows on many new modules, and at the end. Whatever else is made is collected
as ever. Of `lorafold train` this takes 1.5 s of CPU time away.

The first is for a process that does one thing, since what is garbage when it is set aside stays
until the process ends.
"""

import _thread
import gc
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SOON = 0.02  # seconds, after which what interrupted is done with
MANY = 1.1  # times the modules that there were; a module or two are imported at any time


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
    """Collect once, and set what is left aside until the block ends: a full collection of all that
    a server works with would stop its threads for 0.3 s.
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
