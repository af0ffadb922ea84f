"""What a model and a step of it really hold, counted at the allocator: what an estimate is checked against.

On CUDA that is torch's own count; elsewhere a walk over the tensors that live, and a `Ledger` of those that the step makes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafold.memory.ledger import Ledger, distinct_bytes


def living() -> int:
    """Bytes of all tensors on the CPU that anything in this process still holds."""
    gc.collect()
    return distinct_bytes(t for t in _tensors() if t.device.type == "cpu" and not t.is_sparse)


def _tensors() -> list[Tensor]:
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor)]


def peak_of(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that tensors hold while the step runs, those that were there before included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    before = living()
    with Ledger() as ledger:
        step()
    return before + ledger.peak
