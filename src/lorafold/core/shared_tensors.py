"""Copies of a model that share its tensors, and modules built without initialization."""

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
    """Returns a copy of the model that shares its tensors. Trainable tensors get separate version
    counters, so that in-place operations on the copy don't disturb the model's autograd.
    """
    memo = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(tensor): tensor for module in model.modules() for tensor in _tensors_of(module)}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.data, requires_grad=False) if p.requires_grad else p
    return copy.deepcopy(model, memo)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors inside objects that a module has as attributes, such as a quantization
    state.
    """
    pending, visited = [*vars(module).values()], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in visited or isinstance(value, nn.Module | type) or callable(value):
            continue
        visited.add(id(value))
        for inner in vars(value).values() if hasattr(value, "__dict__") else ():
            if isinstance(inner, Tensor):
                yield inner
            else:
                pending.append(inner)


CONSTRUCTORS = (torch.empty, torch.zeros, torch.ones, torch.full)
INITIALIZERS = (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_)


class skip_init(TorchFunctionMode):
    """Context manager: init functions without a generator leave tensors uninitialized in this
    thread. Creating tensors with more than `most` elements in total raises LorafoldError.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = self._most = most

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        options = kwargs or {}
        if function in INITIALIZERS and options.get("generator") is None:
            return args[0] if args else options["tensor"]
        if function in CONSTRUCTORS:
            size = options.get("size", args[0] if args and not isinstance(args[0], int) else args)
            self._left -= math.prod(size)
            if self._left < 0:
                raise LorafoldError(
                    f"the config describes tensors with more than {self._most:,} elements, far"
                    " more than the file has"
                )
        return function(*args, **options)
