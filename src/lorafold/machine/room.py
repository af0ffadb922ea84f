"""The memory that is free for tensors, on a GPU or on the host, and the most that was in use."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")  # where a container's memory limit is


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
