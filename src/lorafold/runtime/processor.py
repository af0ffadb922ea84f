"""The processor: its name, how many of its cores this process may use, how busy others keep them,
its instructions for matmuls, and the threads that compute on it.

Threads that spin while they wait slow down busy machines, and sleeping ones are slow to wake on
quiet ones; GCC's OpenMP lets none spin while a process has more threads than cores. So
`considerate` looks at the load once a second and holds a team of its own while others are busy
(SmolLM2-135M in bf16, two cores of an AMD EPYC: spinning and sleeping 95 and 56 tokens/s alone, 36
and 47 beside two busy processes). For the same reason a thread that need not compute in parallel
computes `alone`: a step of the engine took 48 ms instead of 28 after another thread had once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")  # where a container's limits are
BUSY, QUIET = 0.3, 0.1  # cores that others use: above, below
PAUSE = 1.0  # seconds between two looks
GRAIN = 1 << 16  # numbers for which one thread is enough, at least
SOFT = 1  # omp_pause_soft: threads are made again when they are needed
STACK = 32 << 20  # bytes of a stack; the pages that are never used take no memory
LOOKS = 3  # quiet ones in a row before it counts as quiet
_lock = threading.Lock()
_users = 0
_ended = threading.Event()


def processor_name() -> str:
    """The model's name where the system tells it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*named, platform.processor(), platform.machine()]), "unknown")


def usable_cores(group: Path = CONTROL_GROUP) -> int:
    """The cores that this process may run on, or fewer where a container's quota is worth fewer."""
    if hasattr(os, "sched_getaffinity"):
        there = len(os.sched_getaffinity(0))
    else:
        there = os.cpu_count() or 1
    return min(there, ceil(quota(group)) if quota(group) < there else there)


def quota(group: Path) -> float:
    """How many cores' time a control group (version 2) may take; infinite if it has no limit."""
    try:
        most, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if most == "max" else int(most) / int(period)


class Neighbours:
    """How many of this process's cores others keep busy."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._times()

    def look(self) -> float:
        """Cores that were busy for others since the last look, on average."""
        before, self._before = self._before, self._times()
        passed, everyone, here = (x - y for x, y in zip(self._before, before, strict=True))
        return max(0.0, (everyone - here) / passed) if passed else 0.0

    def _times(self) -> tuple[float, float, float]:
        """Now, and the seconds that all and this process have computed on its cores."""
        every = psutil.cpu_times(percpu=True)
        here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
        # a guest's time is in user's already
        working = ("user", "system", "nice", "irq", "softirq")
        busy = sum(getattr(every[n], k, 0) for n in here if n < len(every) for k in working)
        process = self._process.cpu_times()
        return time.perf_counter(), busy, process.user + process.system


def busy_elsewhere(seconds: float) -> float:
    """How many cores other processes kept busy, on average, while this one slept so long."""
    neighbours = Neighbours()
    time.sleep(seconds)
    return neighbours.look()


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of x86 processors that decide how fast matrices are multiplied; empty on
    others.
    """
    import torch

    known = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX512": torch.cpu._is_avx512_supported,
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported,
        "AMX": torch.cpu._is_amx_tile_supported,
    }
    return tuple(name for name, supported in known.items() if supported())


@contextmanager
def considerate() -> Iterator[None]:
    """While it lasts, threads wait asleep whenever others are busy. Nothing happens where there is
    one thread, or another OpenMP than GCC's.
    """
    global _users, _ended
    import torch  # in functions alone, for `stacks` serves processes that do without

    if torch.get_num_threads() == 1:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _ended = threading.Event()
            threading.Thread(target=_watch, args=(_ended,), name="load", daemon=True).start()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _ended.set()


def _watch(ended: threading.Event) -> None:
    neighbours, together, quiet = Neighbours(), False, 0
    while not ended.wait(PAUSE):
        busy = neighbours.look()
        quiet = quiet + 1 if busy < QUIET else 0
        if busy > BUSY and not together:
            together = gather(max(2, usable_cores()))
        elif together and quiet >= LOOKS:
            disband()
            together = False
    disband()


@contextmanager
def stacks(size: int = STACK) -> Iterator[None]:
    """Give threads that start in the block stacks of one size, because native code that parses
    requests recurses.
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
    function = getattr(ctypes.CDLL(None), name, None)  # none without OpenMP
    if function is not None:
        function(argument)
