"""Defences against fine-tuning, and the share of its energy in the alignment's directions.

    dW (out, in)        the tuning's update of a module; U (out, r), V (in, r) the singular vectors
                        of the alignment's
    written             sum |U^T dW|^2 / sum |dW|^2, over the modules
    read                sum |dW V|^2 / sum |dW|^2
    by chance           sum (r / out) |dW|^2 / sum |dW|^2, and with r / in
    outside_alignment   (I - U U^T) dW (I - V V^T), exact in the factors of dW

Modules are weighted by the tuning's energy, so a direction with almost no change counts for almost
nothing, unlike in phi (Hu et al. 2021, arXiv 2106.09685, sec. 7). A module that the alignment does
not change has r = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lorafold.adapter import Adapter
from lorafold.core.delta import Additive
from lorafold.inspecting.updates import (
    Factors,
    SiteFactors,
    Svd,
    Svds,
    add_lora,
    module_path,
    modules_of,
    stacked,
)


@dataclass(frozen=True)
class Overlap:
    """The shares of the tuning's energy in the alignment's output (`written`) and input (`read`)
    directions, and the shares in random directions (`*_by_chance`).
    """

    written: float
    read: float
    written_by_chance: float
    read_by_chance: float


def updates_of(adapter: Adapter) -> Svds | None:
    """The update of each matrix; None if a part is not added to a weight."""
    if not all(isinstance(part, Additive) for _, part in adapter.parts()):
        return None
    return {name: svd for site in modules_of(adapter) for name, svd in site.parts()}


def overlap(update: Svds, alignment: Svds) -> Overlap | None:
    """The overlap of an update with the alignment's subspaces; None for a zero update."""
    sums = torch.zeros(4, dtype=torch.float64)
    energy = 0.0
    for path, tuned in update.items():
        strengths = tuned.s.cpu().double()  # Apple's GPUs have no doubles
        size = strengths.square().sum()
        energy += size.item()
        if (aligned := alignment.get(path)) is None:
            continue
        shares = [
            ((basis.t() @ vectors).cpu().double() * strengths).square().sum()
            for basis, vectors in ((aligned.u, tuned.u), (aligned.v, tuned.v))
        ]
        chance = [size * len(aligned.s) / len(side) for side in (tuned.u, tuned.v)]
        sums += torch.stack([*shares, *chance])
    return Overlap(*(sums / energy).tolist()) if energy else None


def factors_of(update: Svd) -> Factors:  # (out, r), (r, in)
    return update.u * update.s, update.v.t()


def outside_alignment(update: Svd, alignment: Svd | None) -> Factors:  # (out, r), (r, in)
    """The update without the alignment's directions, on both sides."""
    up, down = factors_of(update)
    if alignment is None:
        return up, down
    u, v = alignment.u, alignment.v
    return up - u @ (u.t() @ up), down - (down @ v) @ v.t()


@dataclass(frozen=True)
class Defence:
    """A defence: its description, and the function that changes the tuning, or mixed rows."""

    about: str
    transform_update: Callable[[Svds, Svds], SiteFactors] | None = None
    mixed: bool = False


def projected(tuning: Svds, alignment: Svds) -> dict[str, Factors]:
    """The tuning without the alignment's directions: up (out, r), down (r, in) by module."""
    return {path: outside_alignment(update, alignment.get(path)) for path, update in tuning.items()}


def halved(tuning: Svds, alignment: Svds) -> dict[str, Factors]:
    """Half of the tuning: up (out, r), down (r, in) by module."""
    return {path: (up / 2, down) for path, (up, down) in _all_factors(tuning).items()}


def readded(tuning: Svds, alignment: Svds) -> dict[str, Factors]:
    """The tuning plus the alignment's update: up (out, r + r'), down (r + r', in) by module."""
    tuned, aligned = _all_factors(tuning), _all_factors(alignment)
    pairs = {path: [f[path] for f in (tuned, aligned) if path in f] for path in tuned | aligned}
    return {
        path: (torch.cat([up for up, _ in summands], 1), torch.cat([down for _, down in summands]))
        for path, summands in pairs.items()
    }


def _all_factors(updates: Svds) -> dict[str, Factors]:
    return {path: factors_of(update) for path, update in updates.items()}


DEFENCES = {
    "none": Defence("the tuning as trained, without a defence"),
    "halved": Defence("half of the tuning's update, as a baseline for defences", halved),
    "projected": Defence("the tuning's update outside the alignment's subspaces", projected),
    "mixed": Defence("tuning on benign examples and as many refusals", mixed=True),
    "readded": Defence("the alignment's update added again after the tuning", readded),
}


@contextmanager
def attached(model: nn.Module, factors: SiteFactors) -> Iterator[None]:
    """Attach factors as a LoRA adapter, by module or matrix of experts."""
    sites: dict[str, list[Factors]] = {}
    for name, pair in factors.items():
        sites.setdefault(module_path(name), []).append(pair)
    by_module = {
        path: stacked(pairs, () if path in factors else (len(pairs),))
        for path, pairs in sites.items()
    }
    nonzero = {path: pair for path, pair in by_module.items() if pair[1].shape[-2]}
    if not nonzero:
        yield
        return
    adapter = add_lora(model, nonzero, "defended")
    try:
        yield
    finally:
        adapter.detach()
