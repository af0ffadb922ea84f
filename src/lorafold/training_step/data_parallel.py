"""Data parallelism with replicated tensors (DDP); for sharded ones, `sharded_data_parallel.py`."""

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
    """Each process holds all tensors; until gradients are summed, each has only the gradients of
    its share of the batch.
    """

    is_sharded = False  # whether all processes must run each pass together
    # contexts in which an optimizer updates the parameters, in all processes;
    updating: Callable[[], AbstractContextManager[Any]] = nullcontext
    # a model is loaded for a device, and this process keeps its share;
    loading: Callable[[torch.device], AbstractContextManager[Any]] = nullcontext
    # operations see full tensors, in all processes at once;
    gathering: Callable[[], AbstractContextManager[Any]] = nullcontext
    # each process works on its own tensors, without the others.
    uncoordinated: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def owns(self, p: nn.Parameter) -> bool:
        """Whether this process has the parameter (any shape)."""
        return True

    def updates(self, p: nn.Parameter) -> bool:
        """Whether this process updates the parameter (any shape) and has its optimizer state."""
        return True

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over processes. A parameter without a gradient in any process keeps
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
        """The parameters that have a gradient, and whether any of its elements is nonzero."""
        return {p: bool(p.grad.any()) for p in parameters if p.grad is not None}

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm () of all gradients, the same in all processes."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def pieces(self, state: Mapping[str, Tensor]) -> dict[str, PendingTensor]:
        """The tensors of a state, of any shapes, for rank 0 to write; all processes must get each
        in turn.
        """
        return {
            name: PendingTensor(tuple(t.shape), t.dtype, t.detach)
            for name, t in (state.items() if self.processes.first else ())
        }

    def cached(
        self, kind: str, key: str, write: Callable[[Path], None], notice: Callable[[str], None]
    ) -> Path:
        """`files.cache.cache_entry` for results that all processes compute together."""
        return cache_entry(kind, key, write, notice)

    def gather_to_first(self) -> None:
        """Gather all tensors in rank 0, which writes them."""
