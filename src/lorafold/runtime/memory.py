"""The memory that is free for tensors, on a GPU or on the host, and the most that was in use.

glibc returns freed blocks above its mmap threshold to the system, and keeps smaller ones.
`freed_blocks(RETURNED)` is for loading, with one pass over large tensors that leaves small ones
between them (2.2 GB as NF4 peak at 0.9 GB instead of 1.4), `freed_blocks(KEPT)` for training, whose
steps allocate and free the same large blocks again and again. Both set both thresholds, because
setting one switches off the rule that adapts the other.
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

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the numbers of glibc's settings
LARGEST = 32 << 20  # the most that glibc accepts of the latter
KEPT = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: 1 << 30}
RETURNED = {MMAP_THRESHOLD: 1 << 20, TRIM_THRESHOLD: 1 << 20}
ADAPTED = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: 2 * LARGEST}


def free_bytes(device: torch.device, group: Path = CONTROL_GROUP) -> int:
    """The bytes that tensors can still take: on a CUDA device the driver's free memory and the
    reserved memory that is unused; elsewhere the host's available memory, or the rest of the memory
    limit of a control group (version 2), without the kernel's file cache.
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
    """The most bytes that the process had in use: allocated on a CUDA device, else resident on the
    host.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def freed_blocks(thresholds: Mapping[int, int]) -> Iterator[bool]:
    """Keep or return freed blocks; at the end they are returned.

    Yields whether that is possible on this system.
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
        for one in ADAPTED.items():
            libc.mallopt(*one)


def give_back() -> None:
    """Return freed blocks to the system now: a flood of requests left 70 MB in fragments."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
