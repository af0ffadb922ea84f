"""Data parallelism with replicated tensors (DDP); `sharded_data_parallel.py` has the sharded
variant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.files.cache import cache_entry
from lorafold.models.weights import PendingTensor
from lorafold.runtime.processes import Processes


class Replicated:
    """Data parallelism in which each process holds all tensors. Each has only the gradients of its
    share of the batch, until `add_gradients` sums them.
    """

    is_sharded = False  # whether all processes must run each forward and backward pass together
    # the context of an optimizer step, which all processes enter
    updating: Callable[[], AbstractContextManager[Any]] = nullcontext
    # the context in which a model is loaded for a device; this process keeps its shards
    loading: Callable[[torch.device], AbstractContextManager[Any]] = nullcontext
    # the context in which operations see full tensors; all processes must run the same operations
    gathering: Callable[[], AbstractContextManager[Any]] = nullcontext
    # the context in which a process uses the tensors that it holds, without the other processes
    uncoordinated: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def owns(self, p: nn.Parameter) -> bool:
        """Whether this process holds the parameter (any shape)."""
        return True

    def updates(self, p: nn.Parameter) -> bool:
        """Whether this process updates the parameter (any shape) and has its optimizer state."""
        return True

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over processes. A parameter without a gradient in any process gets
        none.
        """
        if self.processes.count == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        self.processes.add([has])
        used = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
        for p in used:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad
        self.processes.add([p.grad for p in used if p.grad is not None])

    def nonzero_gradients(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, bool]:
        return {p: bool(p.grad.any()) for p in parameters if p.grad is not None}

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The L2 norm () of all gradients, the same in all processes."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def pieces(self, state: Mapping[str, Tensor]) -> dict[str, PendingTensor]:
        """The tensors (any shapes) of a state dict, for rank 0 to write. All processes must call
        `get` on each tensor, in the same order, because rank 0 may receive them from others.
        """
        return {
            name: PendingTensor(tuple(t.shape), t.dtype, t.detach)
            for name, t in (state.items() if self.processes.first else ())
        }

    def cached(
        self, kind: str, key: str, write: Callable[[Path], None], notice: Callable[[str], None]
    ) -> Path:
        """Calls `files.cache.cache_entry` for a result that all processes compute together."""
        return cache_entry(kind, key, write, notice)

    def gather_to_first(self) -> None:
        """Gathers all tensors in rank 0, which writes them to files."""
