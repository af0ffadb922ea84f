"""Low-rank updates of several matrices in the form in which the engine holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.core.delta import Delta
from lorafold.engine.structure import Shape

# Products of a larger rank take longer than the base's own, whose rows they would all have to pad
RANK = 64


@dataclass(frozen=True)
class Factors:
    """Low-rank updates of n matrices of one shape: their indices among the shape's paths (n,), down
    (n, in, r) and up (n, r, out), which has every scale in it, zero beyond a matrix's own rank.
    """

    at: Tensor
    down: Tensor
    up: Tensor
    index: Mapping[int, int]  # from an index among the shape's paths to that among the n


def low_rank(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """The factors up (out, r) and down (r, in) of a delta that is served as a product."""
    found = delta.factors()
    return None if found is None or len(found[1]) > RANK else found


def factors_of(
    shape: Shape, found: Sequence[tuple[int, Tensor, Tensor]], dtype: torch.dtype
) -> Factors:
    """Factors in a dtype from the index, the up factor (out, r) and the down factor (r, in) of each
    of some matrices of a shape.
    """
    rank = max(len(down) for _, _, down in found)
    like = found[0][1]
    # as files have them, since transposing takes six times as long as this copy
    down = like.new_zeros(len(found), rank, shape.inn, dtype=dtype)
    up = like.new_zeros(len(found), shape.out, rank, dtype=dtype)
    for k, (_, u, d) in enumerate(found):
        down[k, : len(d)] = d
        up[k, :, : len(d)] = u
    at = [at for at, _, _ in found]
    index = {at: k for k, at in enumerate(at)}
    return Factors(torch.tensor(at, device=like.device), down.mT, up.mT, index)
