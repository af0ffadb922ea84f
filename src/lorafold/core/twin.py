"""A second shell of a model: modules of its own over the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A copy of the model whose tensors are the model's own: what is written to one is read by
    both. Its parameters ask for no gradients, and those that train have versions of their own, so
    that a backward of the model does not take what is done to the twin's for a change of its own.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
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
