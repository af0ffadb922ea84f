"""What the adapters that run have for the matrices of one shape, side by side: down (n, places, r,
in), up (n, places, r, out), gains and offsets (n, places, out) for n matrices. It is copied there
when an adapter's first request gets its slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafold.core.delta import Delta
from lorafold.engine.operations import Operations
from lorafold.engine.structure import Shape

# Products of a larger rank take longer than the base's own, whose rows they would all have to pad
RANK = 64
NOBODY = 0  # the place of rows of the base, which stays zero


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


class Stacks:
    """What the adapter in each place has for the matrices of one shape."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        self.shape, self.operations = shape, operations
        self.ranks = torch.zeros(NOBODY + 1, dtype=torch.long)
        self.down: Tensor | None = None  # (n, places, r, in)
        self.up: Tensor | None = None  # (n, places, r, out)
        self.gains: Tensor | None = None  # (n, places, out), 1 where there is none
        self.offsets: Tensor | None = None  # (n, places, out)

    def place(self, place: int, factors: Factors) -> None:
        """Copy an adapter's factors to a place, which is zero."""
        rank = factors.down.shape[2]
        if self.down is None or self.down.shape[2] < rank:
            self._grow(rank, factors.down)
        assert self.down is not None
        assert self.up is not None
        self.down[factors.at, place, :rank] = factors.down.mT.to(self.down.dtype)
        self.up[factors.at, place, :rank] = factors.up.to(self.up.dtype)
        self.ranks[place] = rank

    def gain(self, place: int, index: int, g: Tensor, c: Tensor | None) -> None:
        """Copy a gain and an offset (out,) to a place, for the matrix with that index."""
        with torch.inference_mode(False):
            shape = len(self.shape.paths), len(self.ranks), self.shape.out
            if self.gains is None:
                self.gains = g.new_ones(shape, dtype=torch.float32)
            if self.offsets is None and c is not None:
                self.offsets = g.new_zeros(shape, dtype=torch.float32)
        self.gains[index, place] = g
        if c is not None and self.offsets is not None:
            self.offsets[index, place] = c

    def clear(self, place: int) -> None:
        """Have nothing in a place."""
        for stack in (self.down, self.up, self.offsets):
            if stack is not None:
                stack[:, place] = 0
        if self.gains is not None:
            self.gains[:, place] = 1
        self.ranks[place] = 0

    def widen(self, places: int) -> None:
        """Have so many places, which are more than there are."""
        more = places - len(self.ranks)
        self.ranks = pad(self.ranks, (0, more))
        if self.down is not None:
            self._grow(self.down.shape[2], self.down)
        with torch.inference_mode(False):
            if self.gains is not None:
                self.gains = pad(self.gains, (0, 0, 0, more), value=1.0)
            if self.offsets is not None:
                self.offsets = pad(self.offsets, (0, 0, 0, more))

    @property
    def nbytes(self) -> int:
        """The bytes of all."""
        stacks = self.down, self.up, self.gains, self.offsets
        return sum(t.nbytes for t in stacks if t is not None)

    def _grow(self, rank: int, like: Tensor) -> None:
        n, places, old = len(self.shape.paths), len(self.ranks), (self.down, self.up)
        with torch.inference_mode(False):
            dtype = self.operations.stored(like)
            self.down = like.new_zeros(n, places, rank, self.shape.inn, dtype=dtype)
            self.up = like.new_zeros(n, places, rank, self.shape.out, dtype=dtype)
        for new, t in zip((self.down, self.up), old, strict=True):
            if t is not None:
                new[:, : t.shape[1], : t.shape[2]] = t
