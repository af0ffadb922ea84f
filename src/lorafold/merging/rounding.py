"""Rounds merged weights to their stored dtype, and measures the rounding error.

    T = W + dW (fp32)  ->  W' in the dtype of W
    nearest         loses changes below half a unit in the last place, so small updates vanish
    stochastic      rounds up with the probability of the remainder, so that E[W'] = T (Gupta et al.
                    2015, arXiv 1502.02551)
    auto            nearest if the update survives it, else stochastic
    survival        <W' - W, dW> / <dW, dW>     the remaining share of the update, by projection
    noise           |W' - T| / |dW|             the rounding error relative to the update
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add
from typing import Literal

import torch
from torch import Tensor

from lorafold.core.rounding import stochastic
from lorafold.errors import LorafoldError

Rounding = Literal["auto", "nearest", "stochastic"]
CHUNK = 1 << 20  # elements
MIN_SURVIVAL = 0.98  # the smallest survival at which auto rounds to nearest


@dataclass(frozen=True)
class RoundingStats:
    """Sums over tensors: `surviving` is <W' - W, dW>, `update` <dW, dW>, `error` |W' - T|^2."""

    surviving: float = 0.0
    update: float = 0.0
    error: float = 0.0

    def __add__(self, other: RoundingStats) -> RoundingStats:
        return RoundingStats(*map(add, astuple(self), astuple(other)))

    @property
    def survival(self) -> float:
        return self.surviving / self.update if self.update else 1.0

    @property
    def noise(self) -> float:
        return (self.error / self.update) ** 0.5 if self.update else 0.0


@dataclass(frozen=True)
class RoundedTensor:
    """The rounded weight, statistics, and the mode: nearest, stochastic, or exact (not rounded)."""

    tensor: Tensor
    stats: RoundingStats
    mode: str


def round_to(
    target: Tensor, original: Tensor, mode: Rounding, generator: torch.Generator
) -> RoundedTensor:
    """Rounds a merged weight, of any shape, to the dtype of the original weight."""
    if mode == "auto":
        nearest = _round(target, original, "nearest", generator)
        if nearest.stats.survival >= MIN_SURVIVAL:
            return nearest
        mode = "stochastic"
    return _round(target, original, mode, generator)


def _round(
    target: Tensor, original: Tensor, mode: Rounding, generator: torch.Generator
) -> RoundedTensor:
    dtype = original.dtype
    narrower = torch.finfo(dtype).bits < torch.finfo(target.dtype).bits
    out = torch.empty(target.shape, dtype=dtype)
    stats = RoundingStats()
    size = max(1, CHUNK * len(target) // max(1, target.numel()))
    for t, w, o in zip(target.split(size), original.split(size), out.split(size), strict=True):
        o.copy_(stochastic(t, dtype, generator) if narrower and mode == "stochastic" else t)
        wide = o.to(t.dtype)
        if not wide.isfinite().all():
            raise LorafoldError(
                f"merged values: found up to {t.abs().max().item():g}, which"
                f" {str(dtype).removeprefix('torch.')} can't represent; store the weights in a"
                " wider dtype"
            )
        change, update = wide - w, t - w
        stats += RoundingStats(
            torch.sum(change * update).item(),
            torch.sum(update * update).item(),
            torch.sum((wide - t) ** 2).item(),
        )
    return RoundedTensor(out, stats, mode if narrower else "exact")
