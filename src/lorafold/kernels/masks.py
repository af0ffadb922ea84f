"""Masks of dropout on CUDA in Triton: one launch, where the plain form has more than a hundred."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.ops.dropout import source, threshold
from lorafold.ops.philox import FACTORS, ROUNDS, STEPS, halves

CALLS = 128  # of Philox in a program, each for 8 elements
NUMBERS = dict(zip(("FIRST", "SECOND", "STEP", "OTHER"), (*FACTORS, *STEPS), strict=True))


def forms() -> Any:
    """The operations by their names. Raises LorafoldError where Triton is missing."""
    return _Forms()


class _Forms:
    def __init__(self) -> None:
        try:
            from lorafold.kernels.masks_triton import dropped_mask
        except ImportError:
            raise LorafoldError("Triton is not installed") from None
        self._kernel: Any = dropped_mask

    def dropped_mask(self, x: Tensor, p: float, names: Tensor | None, key: int, site: int) -> Any:
        names, key = source(x, names, key)
        width, limit = x.shape[-1], threshold(p)
        found = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        grid = len(names), -(-width // (8 * CALLS))
        given = names.contiguous(), found.view(torch.uint8), width, limit, *halves(key), site
        self._kernel[grid](*given, **NUMBERS, ROUNDS=ROUNDS, CALLS=CALLS)
        return found
