"""Rounds merged weights to their stored dtype, and measures the loss.

    T = W + dW (fp32)  ->  W' in the dtype of W
    nearest         loses changes below half a unit in the last place, so small updates vanish
    stochastic      rounds up with the probability of the remainder, so that E[W'] = T (Gupta et al.
                    2015, arXiv 1502.02551)
    auto            nearest if the update survives it, else stochastic
    survival        <W' - W, dW> / <dW, dW>     the remaining share of the update, by projection
    noise           |W' - T| / |dW|             the rounding error relative to the update
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorafold.core.rounding import stochastic
from lorafold.errors import LorafoldError

Rounding = Literal["auto", "nearest", "stochastic"]
CHUNK = 1 << 20  # elements
SURVIVES = 0.98  # the smallest survival at which auto rounds to nearest


@dataclass(frozen=True)
class Sums:
    """Sums over tensors: kept is <W' - W, dW>, update <dW, dW>, error |W' - T|^2."""

    kept: float = 0.0
    update: float = 0.0
    error: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.kept + other.kept, self.update + other.update, self.error + other.error)

    @property
    def survival(self) -> float:
        """The share of the update that remains after rounding; 1 without an update."""
        return self.kept / self.update if self.update else 1.0

    @property
    def noise(self) -> float:
        """The rounding error relative to the update; 0 without an update."""
        return (self.error / self.update) ** 0.5 if self.update else 0.0


@dataclass(frozen=True)
class Rounded:
    """The rounded weight, its sums, and how: nearest, stochastic, or exact (not rounded)."""

    tensor: Tensor
    sums: Sums
    how: str


def round_to(
    target: Tensor, original: Tensor, how: Rounding, generator: torch.Generator
) -> Rounded:
    """Round a merged weight, of any shape, to the dtype of the original weight."""
    if how != "auto":
        return _rounded(target, original, how, generator)
    nearest = _rounded(target, original, "nearest", generator)
    return (
        nearest
        if nearest.sums.survival >= SURVIVES
        else _rounded(target, original, "stochastic", generator)
    )


def _rounded(
    target: Tensor, original: Tensor, how: Rounding, generator: torch.Generator
) -> Rounded:
    dtype = original.dtype
    narrower = torch.finfo(dtype).bits < torch.finfo(target.dtype).bits
    out = torch.empty(target.shape, dtype=dtype)
    sums = Sums()
    size = max(1, CHUNK * len(target) // max(1, target.numel()))
    for t, w, o in zip(target.split(size), original.split(size), out.split(size), strict=True):
        o.copy_(stochastic(t, dtype, generator) if narrower and how == "stochastic" else t)
        wide = o.to(t.dtype)
        if not wide.isfinite().all():
            raise LorafoldError(
                f"merged values: found up to {t.abs().max().item():g}, which"
                f" {str(dtype).removeprefix('torch.')} can't represent; store the weights in a"
                " wider dtype"
            )
        change, update = wide - w, t - w
        sums += Sums(
            torch.sum(change * update).item(),
            torch.sum(update * update).item(),
            torch.sum((wide - t) ** 2).item(),
        )
    return Rounded(out, sums, how if narrower else "exact")
