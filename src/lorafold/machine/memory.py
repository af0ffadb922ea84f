"""The memory that is free for tensors, on a GPU or on the host, and the most that was in use.

glibc returns freed blocks above its mmap threshold to the system, and keeps smaller ones.
`freed_blocks_returned` is for loading, `freed_blocks_kept` for training; both set both thresholds,
because setting one switches off the rule that adapts the other, and end with those that this rule
reaches in a process that frees large blocks. Other C libraries are left alone.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")  # where a container's memory limit is
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the most glibc accepts
_ADAPTED = (_LARGEST_MMAP_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)


def free_bytes(device: torch.device) -> int:
    """The bytes that tensors can still take.

    On a CUDA device, what the driver has free and what torch has reserved and not in use; elsewhere
    the host's available memory, or what is left of a container's limit if that is less.
    """
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return int(min(psutil.virtual_memory().available, limited(CONTROL_GROUP)))


def limited(group: Path) -> float:
    """The bytes that are left of the memory limit of a control group (version 2), without counting
    the kernel's file cache; infinite if it has no limit.
    """
    try:
        limit, statistics = (group / "memory.max").read_text(), (group / "memory.stat").read_text()
    except OSError:
        return float("inf")
    used = dict(line.split() for line in statistics.splitlines())
    return float("inf") if limit.strip() == "max" else max(0, int(limit) - int(used["anon"]))


def peak_bytes(device: torch.device) -> int:
    """The most bytes that the process had in use: allocated on a CUDA device, else resident on the
    host.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


@contextmanager
def freed_blocks_kept() -> Iterator[bool]:
    """Keep freed blocks: for steps that allocate and free the same large blocks again and again.
    They are returned at the end.

    Yields whether that is possible on this system.
    """
    try:
        yield _set_thresholds(_LARGEST_MMAP_THRESHOLD, 1 << 30)
    finally:
        _set_thresholds(*_ADAPTED)


@contextmanager
def freed_blocks_returned() -> Iterator[bool]:
    """Return freed blocks: for one pass over large tensors that leaves small ones between them.
    Loading 2.2 GB as NF4 peaks at 0.9 GB instead of 1.4.

    Yields whether that is possible on this system.
    """
    try:
        yield _set_thresholds(1 << 20, 1 << 20)
    finally:
        _set_thresholds(*_ADAPTED)


def give_back() -> None:
    """Return freed blocks to the system now: a flood of requests left 70 MB in fragments."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _set_thresholds(mmap: int, trim: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    ctypes.CDLL(None).malloc_trim(0)
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap) and mallopt(_M_TRIM_THRESHOLD, trim))
