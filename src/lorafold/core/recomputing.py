"""Running a function whose intermediate tensors the backward computes again.

A matrix that is built for one product has a weight's size, so a step must not keep one for every
layer. Gradients are those of the plain run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """run(*args), a tensor of any shape. `run` draws no random numbers.

    Args:
        run: the function; it may use other tensors as well, whose gradients it gives.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return run(*args)
    y: Tensor = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    return y
