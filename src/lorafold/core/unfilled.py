"""Deltas without their random start, for those whose values come from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

RANDOM = (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_)


class unfilled(TorchFunctionMode):
    """Context in which these functions draw nothing in this thread, unless from a generator that
    they are given: their tensors stay as the memory was.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = kwargs or {}
        if function in RANDOM and given.get("generator") is None:
            return args[0] if args else given["tensor"]
        return function(*args, **given)
