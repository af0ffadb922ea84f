"""Deltas without their random start, and of a bounded size: their values come from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lorafold.errors import LorafoldError

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
