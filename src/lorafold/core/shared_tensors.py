"""Modules without numbers of their own: a second shell of a model over the same tensors, and deltas
without their random start, whose values come from a file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorafold.errors import LorafoldError

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A copy of the model whose tensors are the model's own: what is written to one is read by
    both. Its parameters ask for no gradients, and those that train have versions of their own, so
    that a backward of the model does not take what is done to the twin's for a change of its own.
    """
    memo = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(tensor): tensor for module in model.modules() for tensor in _kept(module)}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.data, requires_grad=False) if p.requires_grad else p
    return copy.deepcopy(model, memo)


def _kept(module: nn.Module) -> Iterator[Tensor]:
    """The tensors in objects that a module keeps, such as the codes of a quantized matrix, which
    are neither parameters nor buffers.
    """
    left, seen = [*vars(module).values()], set[int]()
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, nn.Module | type) or callable(value):
            continue
        seen.add(id(value))
        for inner in vars(value).values() if hasattr(value, "__dict__") else ():
            if isinstance(inner, Tensor):
                yield inner
            else:
                left.append(inner)


EMPTY = (torch.empty, torch.zeros, torch.ones, torch.full)
RANDOM = (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_)


class skip_init(TorchFunctionMode):
    """Context in which these functions draw nothing in this thread, unless from a generator that
    they are given: their tensors stay as the memory was. Raises LorafoldError for tensors of more
    numbers in all than `most`.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = self._most = most

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = kwargs or {}
        if function in RANDOM and given.get("generator") is None:
            return args[0] if args else given["tensor"]
        if function in EMPTY:
            size = given.get("size", args[0] if args and not isinstance(args[0], int) else args)
            self._left -= math.prod(size)
            if self._left < 0:
                raise LorafoldError(
                    f"its config asks for tensors of more than {self._most:,} numbers, far more"
                    " than its file has"
                )
        return function(*args, **given)
