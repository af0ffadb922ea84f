"""The processor: its name, how many of its cores this process may use, how busy others keep them,
and its instructions for matrix products.
"""

from __future__ import annotations

import os
import platform
import time
from math import ceil
from pathlib import Path

import psutil

from lorafold.machine.room import CONTROL_GROUP


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


def busy_elsewhere(seconds: float) -> float:
    """How many cores other processes kept busy, on average, while this one slept so long."""
    everyone, own = psutil.cpu_times(), psutil.Process().cpu_times()
    start = time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - start
    everyone_later, own_later = psutil.cpu_times(), psutil.Process().cpu_times()
    working = ("user", "system", "nice", "irq", "softirq")  # a guest's time is in user's already
    total = sum(getattr(everyone_later, n, 0) - getattr(everyone, n, 0) for n in working)
    ours = own_later.user + own_later.system - own.user - own.system
    return max(0.0, (total - ours) / passed)


def instruction_sets() -> tuple[str, ...]:
    """Those that decide how fast matrices are multiplied, of x86 processors; empty on others."""
    import torch

    known = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX512": torch.cpu._is_avx512_supported,
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported,
        "AMX": torch.cpu._is_amx_tile_supported,
    }
    return tuple(name for name, supported in known.items() if supported())
