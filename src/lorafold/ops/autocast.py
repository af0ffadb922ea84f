"""Fused operations under `torch.autocast`, which casts the inputs of each operation separately.

`lowered` casts the activations of a fused operation once and runs it without autocast, so that sums
between its matmuls are not cast. `Exact` runs autograd functions without autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorafold.ops.checkpoint_segments import computed_once


def at_least_fp32(x: Tensor) -> torch.dtype:
    """Returns the dtype of x (any shape), or fp32 if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def autocasting(x: Tensor) -> bool:
    """Returns whether autocast is enabled for the device of x (any shape)."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def lower(x: Tensor) -> Tensor:
    """Returns x (any shape) in autocast's dtype, as a copy that all layers that read x share; x
    itself if autocast is off or does not cast it (integers, fp64).
    """
    if not autocasting(x) or not x.is_floating_point() or x.dtype is torch.float64:
        return x
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype is dtype:
        return x
    if x.is_leaf and x.requires_grad:  # a copy cached on a leaf would keep the leaf alive
        return x.to(dtype)
    cast = computed_once(x, (), lambda: x.to(dtype))
    return cast if cast.dtype is dtype else x.to(dtype)


def lowered(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns run(*args, **kwargs) with tensors cast by `lower`, outside of autocast."""
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if x is None or not autocasting(x):
        return run(*args, **kwargs)
    args = tuple(lower(a) if isinstance(a, Tensor) else a for a in args)
    kwargs = {k: lower(a) if isinstance(a, Tensor) else a for k, a in kwargs.items()}
    with torch.autocast(x.device.type, enabled=False):
        return run(*args, **kwargs)


class Exact(Function):
    """Abstract: an autograd function whose forward and backward run outside of autocast, and whose
    backward can't be differentiated.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        functions = {"forward": cls.forward, "backward": once_differentiable(cls.backward)}
        for name, function in functions.items():
            setattr(cls, name, staticmethod(_outside(function)))

    @classmethod
    def over_rows(cls, x: Tensor, *args: Any) -> Tensor:
        """Applies the function to the rows of x (..., in), and returns (..., out)."""
        y = cls.apply(x.reshape(-1, x.shape[-1]), *args)
        return y.view(*x.shape[:-1], y.shape[-1])


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(ctx: Any, *args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(ctx, *args)
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(ctx, *args)

    return run
