"""The CPU: its name, usable cores, load by other processes, instruction sets, and OpenMP threads.

Threads that spin while waiting slow down busy machines, and sleeping threads wake slowly on idle
machines. GCC's OpenMP doesn't spin while a process has more threads than cores, so `sleep_if_busy`
creates an extra team of threads while other processes are busy. For the same reason, threads that
don't need parallelism call `use_one_thread`.
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

CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's limits
BUSY_CORES, QUIET_CORES = 0.3, 0.1  # thresholds for the number of cores used by other processes
CHECK_SECONDS = 1.0  # seconds between two measurements
ELEMENTS_PER_THREAD = 1 << 16  # elements per thread that make torch use another thread
OMP_PAUSE_SOFT = 1  # omp_pause_soft: threads are created again on demand
STACK_BYTES = 32 << 20  # bytes of a stack; unused pages take no memory
QUIET_CHECKS = 3  # consecutive quiet measurements that count as quiet
_lock = threading.Lock()
_users = 0
_ended = threading.Event()


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*named, platform.processor(), platform.machine()]), "unknown")


def usable_cores(group: Path = CONTROL_GROUP) -> int:
    """The number of cores that this process may use, which a container's quota may limit."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, ceil(quota(group)) if quota(group) < cores else cores)


def quota(group: Path) -> float:
    """A cgroup's CPU limit (version 2) in cores; may be infinite."""
    try:
        most, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if most == "max" else int(most) / int(period)


class OtherLoad:
    """Measures the load by other processes on this process's cores."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._times()

    def cores_used(self) -> float:
        """The average number of cores used by other processes since the last call."""
        before, self._before = self._before, self._times()
        passed, everyone, here = (x - y for x, y in zip(self._before, before, strict=True))
        return max(0.0, (everyone - here) / passed) if passed else 0.0

    def _times(self) -> tuple[float, float, float]:
        """The time, the CPU seconds of all processes on these cores, and the CPU seconds of this
        process.
        """
        every = psutil.cpu_times(percpu=True)
        here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
        # user time already includes guest time
        working = ("user", "system", "nice", "irq", "softirq")
        busy = sum(getattr(every[n], k, 0) for n in here if n < len(every) for k in working)
        process = self._process.cpu_times()
        return time.perf_counter(), busy, process.user + process.system


def cores_used_by_others(seconds: float) -> float:
    neighbours = OtherLoad()
    time.sleep(seconds)
    return neighbours.cores_used()


def instruction_sets() -> tuple[str, ...]:
    """The x86 instruction sets that determine the speed of matmuls; empty on other processors."""
    import torch

    known = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX512": torch.cpu._is_avx512_supported,
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported,
        "AMX": torch.cpu._is_amx_tile_supported,
    }
    return tuple(name for name, supported in known.items() if supported())


@contextmanager
def sleep_if_busy() -> Iterator[None]:
    """Context in which waiting threads sleep whenever other processes are busy. It has no effect
    with one thread, or without GCC's OpenMP.
    """
    global _users, _ended
    import torch  # not at the top, because processes without torch use `stack_size`

    if torch.get_num_threads() == 1:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _ended = threading.Event()
            threading.Thread(target=_adapt_team, args=(_ended,), name="load", daemon=True).start()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _ended.set()


def _adapt_team(ended: threading.Event) -> None:
    neighbours, has_team, quiet_checks = OtherLoad(), False, 0
    while not ended.wait(CHECK_SECONDS):
        busy = neighbours.cores_used()
        quiet_checks = quiet_checks + 1 if busy < QUIET_CORES else 0
        if busy > BUSY_CORES and not has_team:
            has_team = create_team(max(2, usable_cores()))
        elif has_team and quiet_checks >= QUIET_CHECKS:
            end_team()
            has_team = False
    end_team()


@contextmanager
def stack_size(size: int = STACK_BYTES) -> Iterator[None]:
    """Context that sets the stack size of threads started in the block, because native code that
    parses requests recurses.
    """
    before = threading.stack_size(size)
    try:
        yield
    finally:
        threading.stack_size(before)


def use_one_thread() -> None:
    """Makes the calling thread compute without an OpenMP team."""
    import torch

    torch.get_num_threads()  # the first call in a thread sets the number itself
    _call("omp_set_num_threads", 1)


def create_team(n: int) -> bool:
    """Creates a team of n sleeping threads for the calling thread. Returns False without GCC's
    OpenMP.
    """
    import torch

    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return False
    torch.get_num_threads()
    _call("omp_set_num_threads", n)
    torch.ones(n * ELEMENTS_PER_THREAD).add_(1)
    return True


def end_team() -> None:
    """Ends the calling thread's team; the thread's next parallel region creates a new team."""
    _call("omp_pause_resource_all", OMP_PAUSE_SOFT)


def _call(name: str, argument: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)  # None without OpenMP
    if function is not None:
        function(argument)
