"""How the factors of a fresh delta are filled."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def zeros(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    """A parameter of zeros of that shape, fp32."""
    return nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))


def kaiming(factor: Tensor) -> None:
    """Fill a factor (*matrices, k, in) with kaiming-uniform numbers, as PEFT does: between -b and
    b, b the inverse root of `in`; each of its matrices by itself.
    """
    for matrix in factor.detach().view(-1, *factor.shape[-2:]):
        nn.init.kaiming_uniform_(matrix, a=5**0.5)
