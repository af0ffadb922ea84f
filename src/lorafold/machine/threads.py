"""Threads: the stack that each gets, and OpenMP's, of which a process should not have more than it
has cores.

Every Python thread that computes in parallel gets a team of its own. Once all teams together have
more threads than the machine has cores, GCC's OpenMP lets none of them wait actively any more, so
that each parallel region begins with waking a thread: a step of the engine took 48 ms instead of 28
after another thread had computed in parallel once (two cores of an AMD EPYC). PyTorch has no call
for this: its `set_num_threads` is partly the whole process's.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GRAIN = 1 << 16  # numbers for which one thread is enough, at least
SOFT = 1  # omp_pause_soft: threads are made again when they are needed
STACK = 32 << 20  # bytes of a stack; the pages that are never used take no memory


@contextmanager
def stacks(size: int = STACK) -> Iterator[None]:
    """Give threads that start in the block stacks of one size, whatever the system's limit is:
    native code that reads what a request brought recurses.
    """
    before = threading.stack_size(size)
    try:
        yield
    finally:
        threading.stack_size(before)


def alone() -> None:
    """Let the calling thread compute without a team from now on."""
    import torch

    torch.get_num_threads()  # PyTorch sets the number itself when a thread first asks for it
    _call("omp_set_num_threads", 1)


def gather(n: int) -> bool:
    """Give the calling thread a team of n, which sleeps. False without GCC's OpenMP."""
    import torch

    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return False
    torch.get_num_threads()
    _call("omp_set_num_threads", n)
    torch.ones(n * GRAIN).add_(1)
    return True


def disband() -> None:
    """End the calling thread's team; its next parallel region makes a new one."""
    _call("omp_pause_resource_all", SOFT)


def _call(name: str, argument: int) -> None:
    function: Any = getattr(ctypes.CDLL(None), name, None)  # none without OpenMP
    if function is not None:
        function(argument)
