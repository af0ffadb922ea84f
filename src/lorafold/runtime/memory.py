"""Free and peak memory, and glibc's handling of freed blocks.

glibc returns freed blocks above its mmap threshold to the system, and keeps smaller ones.
`malloc_policy(RETURN_FREED)` is for loading, a single pass over large tensors with small ones in
between, and `malloc_policy(KEEP_FREED)` for training, whose steps reallocate the same large blocks.
Both set both thresholds, because setting one disables glibc's dynamic adjustment of the other.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from lorafold.runtime.processor import CONTROL_GROUP

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt
MAX_MMAP_THRESHOLD = 32 << 20  # glibc's maximum of MMAP_THRESHOLD
KEEP_FREED = {MMAP_THRESHOLD: MAX_MMAP_THRESHOLD, TRIM_THRESHOLD: 1 << 30}
RETURN_FREED = {MMAP_THRESHOLD: 1 << 20, TRIM_THRESHOLD: 1 << 20}
DEFAULTS = {MMAP_THRESHOLD: MAX_MMAP_THRESHOLD, TRIM_THRESHOLD: 2 * MAX_MMAP_THRESHOLD}


def free_bytes(device: torch.device, group: Path = CONTROL_GROUP) -> int:
    """The bytes that tensors can still use. On CUDA, these are the driver's free memory and unused
    reserved memory; otherwise, the host's available memory, or the rest of a cgroup's limit
    (version 2), not counting the file cache.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = psutil.virtual_memory().available
    try:
        limit, statistics = (group / "memory.max").read_text(), (group / "memory.stat").read_text()
    except OSError:
        return available
    used = dict(line.split() for line in statistics.splitlines())
    unlimited = limit.strip() == "max"
    return available if unlimited else min(available, max(0, int(limit) - int(used["anon"])))


def peak_bytes(device: torch.device) -> int:
    """The peak of allocated memory on CUDA, otherwise the peak of the host's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def malloc_policy(thresholds: Mapping[int, int]) -> Iterator[bool]:
    """Context in which glibc keeps or returns freed blocks. Yields whether this system supports it.
    """
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    try:
        yield all(libc.mallopt(*one) for one in thresholds.items())
    finally:
        libc.malloc_trim(0)
        for one in DEFAULTS.items():
            libc.mallopt(*one)


def trim_heap() -> None:
    """Returns freed blocks to the system now."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
