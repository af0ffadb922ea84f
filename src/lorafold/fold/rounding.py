"""Rounding folded weights to the dtype that they are stored in.

    T = W + dW (fp32)  ->  W' in the dtype of W

    nearest         drops every change under half a unit in the last place: a weak update is lost
    stochastic      rounds up with the probability of the remainder, so that E[W'] = T (Gupta et al.
                    2015, arXiv 1502.02551)
    auto            nearest where the update survives it, stochastic where it would not

    survival        <W' - W, dW> / <dW, dW>     the share of the update that is left, projected on
                                                the update
    noise           |W' - T| / |dW|             what the rounding added, in units of the update

A weight stored in fp32 is kept as it is. Works in chunks of rows: its temporaries are a few times
`CHUNK` elements.
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
SURVIVES = 0.98  # the least survival at which auto rounds to nearest


@dataclass(frozen=True)
class Sums:
    """Inner products over any number of tensors: kept <W' - W, dW>, update <dW, dW>, error |W' -
    T|^2.
    """

    kept: float = 0.0
    update: float = 0.0
    error: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.kept + other.kept, self.update + other.update, self.error + other.error)

    @property
    def survival(self) -> float:
        return self.kept / self.update if self.update else 1.0

    @property
    def noise(self) -> float:
        return (self.error / self.update) ** 0.5 if self.update else 0.0


@dataclass(frozen=True)
class Rounded:
    """The weight to store, what became of the update, and how it was rounded: nearest, stochastic,
    or exact where nothing was.
    """

    tensor: Tensor
    sums: Sums
    how: str


def round_to(
    target: Tensor, original: Tensor, how: Rounding, generator: torch.Generator
) -> Rounded:
    """Round `target`, the changed weight in fp32 or wider, to the dtype of `original`, the weight
    before the change. Same shapes.

    Raises LorafoldError for values that the dtype can't hold.
    """
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
    rows = max(1, CHUNK * len(target) // max(1, target.numel()))
    for t, w, o in zip(target.split(rows), original.split(rows), out.split(rows), strict=True):
        o.copy_(stochastic(t, dtype, generator) if narrower and how == "stochastic" else t)
        wide = o.to(t.dtype)
        if not wide.isfinite().all():
            raise LorafoldError(
                f"folded values up to {t.abs().max().item():g} don't fit"
                f" {str(dtype).removeprefix('torch.')}"
            )
        change, update = wide - w, t - w
        sums += Sums(
            torch.sum(change * update).item(),
            torch.sum(update * update).item(),
            torch.sum((wide - t) ** 2).item(),
        )
    return Rounded(out, sums, how if narrower else "exact")
