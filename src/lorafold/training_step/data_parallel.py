"""The tensors of a run whose processes each have all of them, as data parallelism has it.

    replicated.add_gradients(parameters)        summed over the processes, in place
    replicated.norm(parameters)                 of all gradients together
    write_pieces(path, replicated.pieces(state))        of a state, in process 0

`training_step.sharding` divides them behind the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.files.cache import cached
from lorafold.models.weights import PendingTensor
from lorafold.runtime.processes import Processes


class Replicated:
    """Each process has all tensors. Gradients belong to the process's share of a batch until they
    are added.
    """

    divides = False  # whether all have to pass through the model together
    # What a `with` block is for: an optimizer updates the parameters, which all have then;
    updating: Callable[[], AbstractContextManager[Any]] = nullcontext
    # of a model that is loaded for a device, this process keeps its share;
    loading: Callable[[torch.device], AbstractContextManager[Any]] = nullcontext
    # operations find tensors whole, in all processes at once;
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext
    # each process does with what it owns what the others do not do.
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def owns(self, p: nn.Parameter) -> bool:
        """Whether this process has a parameter of any shape."""
        return True

    def updates(self, p: nn.Parameter) -> bool:
        """Whether this process updates a parameter of any shape, and has its optimizer's state."""
        return True

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of all processes; afterwards only who owns a parameter has its one. A
        parameter on which no process's loss depends has none; where some do, the others count as
        zeros.
        """
        if self.processes.count == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        self.processes.add([has])
        used = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
        for p in used:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad
        self.processes.add([p.grad for p in used if p.grad is not None])

    def moves(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, bool]:
        """The parameters that have a gradient, and whether any of its elements is not zero."""
        return {p: bool(p.grad.any()) for p in parameters if p.grad is not None}

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm () of all gradients together, the same in all processes."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def pieces(self, state: Mapping[str, Tensor]) -> dict[str, PendingTensor]:
        """The tensors of a state, of any shapes, as process 0 writes them. All processes get each
        in turn, and process 0 alone has it then.
        """
        return {
            name: PendingTensor(tuple(t.shape), t.dtype, t.detach)
            for name, t in (state.items() if self.processes.first else ())
        }

    def cached(
        self, kind: str, key: str, write: Callable[[Path], None], notice: Callable[[str], None]
    ) -> Path:
        """`files.cache.cached` for results of the model, which all processes compute together."""
        return cached(kind, key, write, notice)

    def gather_to_first(self) -> None:
        """Give process 0 all tensors that it writes."""
