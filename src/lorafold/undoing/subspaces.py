"""Where a tuning lies: the share of its energy in the directions of the alignment's update.

    dW (out, in)        the tuning's update at a site; U (out, r), V (in, r) the singular vectors of
                        the alignment's
    written             sum |U^T dW|^2 / sum |dW|^2, over the sites
    read                sum |dW V|^2 / sum |dW|^2
    by chance           sum (r / out) |dW|^2 / sum |dW|^2, and with r / in: what random directions
                        of the alignment's rank would have on average
    off                 (I - U U^T) dW (I - V V^T), exact in the factors of dW

|.| is the Frobenius norm. Sites weigh by the tuning's energy, directions within one too, so that a
direction in which almost nothing changes counts for almost nothing (which phi, the overlap of whole
subspaces, does not do; Hu et al. 2021, arXiv 2106.09685, sec. 7). A site that the alignment does
not change has r = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.adapter import Adapter
from lorafold.core.delta import Additive
from lorafold.inspecting.updates import Svd, sites

Updates = Mapping[str, Svd]  # by module path
Factors = tuple[Tensor, Tensor]  # up (out, r), with every scale in it, and down (r, in)


@dataclass(frozen=True)
class Overlap:
    """The shares of an update's energy in the alignment's directions, and those by chance."""

    written: float
    read: float
    written_by_chance: float
    read_by_chance: float


def updates_of(adapter: Adapter) -> Updates | None:
    """The update of each matrix of an adapter; None if a part of it is not added to a weight (a
    magnitude, a bias, virtual tokens), so that it has no subspace.
    """
    if not all(isinstance(part, Additive) for _, part in adapter.parts()):
        return None
    return {name: svd for site in sites(adapter) for name, svd in site.parts()}


def overlap(update: Updates, alignment: Updates) -> Overlap | None:
    """How far an update lies in the alignment's subspaces; None for an update that is zero."""
    found = torch.zeros(4, dtype=torch.float64)
    energy = 0.0
    for path, own in update.items():
        strengths = own.s.cpu().double()  # Apple's GPUs have no doubles
        size = strengths.square().sum()
        energy += size.item()
        if (aligned := alignment.get(path)) is None:
            continue
        shares = [
            ((theirs.t() @ mine).cpu().double() * strengths).square().sum()
            for theirs, mine in ((aligned.u, own.u), (aligned.v, own.v))
        ]
        chance = [size * len(aligned.s) / len(side) for side in (own.u, own.v)]
        found += torch.stack([*shares, *chance])
    return Overlap(*(found / energy).tolist()) if energy else None


def factors_of(update: Svd) -> Factors:  # (out, r), (r, in)
    """The update as two factors."""
    return update.u * update.s, update.v.t()


def off(update: Svd, alignment: Svd | None) -> Factors:  # (out, r), (r, in)
    """The update without the alignment's directions, on both sides."""
    up, down = factors_of(update)
    if alignment is None:
        return up, down
    u, v = alignment.u, alignment.v
    return up - u @ (u.t() @ up), down - (down @ v) @ v.t()
