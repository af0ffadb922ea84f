"""A second shell of a model: modules of its own over the same tensors."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A copy of the model whose tensors are the model's own: what is written to one is read by
    both. Its parameters ask for no gradients, and those that train have versions of their own, so
    that a backward of the model does not take what is done to the twin's for a change of its own.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.data, requires_grad=False) if p.requires_grad else p
    return copy.deepcopy(model, memo)
