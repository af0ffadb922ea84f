"""How much memory there is for tensors, on a GPU or on the host, and how much was taken."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")  # where a container is told its limit


def free_bytes(device: torch.device) -> int:
    """What tensors may still take: of a CUDA device's memory what the driver has left and what
    torch holds in reserve; elsewhere of the host's, or of the part of it that a container may use.
    """
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return int(min(psutil.virtual_memory().available, limited(CONTROL_GROUP)))


def limited(group: Path) -> float:
    """What a control group (version 2) leaves of its limit, files that the kernel merely keeps in
    memory not counted; infinite if it has none.
    """
    try:
        limit, statistics = (group / "memory.max").read_text(), (group / "memory.stat").read_text()
    except OSError:
        return float("inf")
    held = dict(line.split() for line in statistics.splitlines())
    return float("inf") if limit.strip() == "max" else max(0, int(limit) - int(held["anon"]))


def peak_bytes(device: torch.device) -> int:
    """The most memory the process held: on the device where it is a GPU, resident on the host
    otherwise.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
