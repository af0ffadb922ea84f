"""Defences against fine-tuning, and the share of the tuning's energy in the alignment's directions.

    dW (out, in)        the update of a module in the tuning; U (out, r) and V (in, r) are the
                        singular vectors of the alignment's update of this module
    written             sum |U^T dW|^2 / sum |dW|^2, over the modules
    read                sum |dW V|^2 / sum |dW|^2
    by chance           the same for random directions: sum (r / out) |dW|^2 / sum |dW|^2 for
                        written, with r / in for read
    outside_alignment   (I - U U^T) dW (I - V V^T), computed exactly from the factors of dW

Modules are weighted by the tuning's energy, so directions with almost no change hardly count,
unlike in phi (Hu et al. 2021, arXiv 2106.09685, sec. 7). A module that the alignment does not
change has r = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lorafold.adapter import Adapter
from lorafold.core.anatomy import grouped
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
    """The shares of the tuning's energy in the alignment's output directions (`written`) and input
    directions (`read`), and the shares expected in random directions (`*_by_chance`).
    """

    written: float
    read: float
    written_by_chance: float
    read_by_chance: float


def updates_of(adapter: Adapter) -> Svds | None:
    """The SVD of each matrix's update; None if a change of the adapter is not added to a weight."""
    if not all(isinstance(part, Additive) for _, part in adapter.parts()):
        return None
    return {name: svd for site in modules_of(adapter) for name, svd in site.parts()}


def overlap(update: Svds, alignment: Svds) -> Overlap | None:
    """The overlap of an update with the alignment's subspaces; None for a zero update."""
    sums = torch.zeros(4, dtype=torch.float64)
    energy = 0.0
    for path, tuned in update.items():
        strengths = tuned.s.cpu().double()  # MPS has no fp64
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
    up, down = factors_of(update)
    if alignment is None:
        return up, down
    u, v = alignment.u, alignment.v
    return up - u @ (u.t() @ up), down - (down @ v) @ v.t()


@dataclass(frozen=True)
class Defence:
    """A defence: its description, and either the function that changes the tuned update, or
    `mixed`, if refusals are mixed into the training rows.
    """

    about: str
    transform_update: Callable[[Svds, Svds], SiteFactors] | None = None
    mixed: bool = False


def projected(tuning: Svds, alignment: Svds) -> dict[str, Factors]:
    return {path: outside_alignment(update, alignment.get(path)) for path, update in tuning.items()}


def halved(tuning: Svds, alignment: Svds) -> dict[str, Factors]:
    return {path: (up / 2, down) for path, (up, down) in _all_factors(tuning).items()}


def readded(tuning: Svds, alignment: Svds) -> dict[str, Factors]:
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
    """Context in which factors, given by module or expert, are attached as a LoRA adapter."""
    sites = grouped((module_path(name), pair) for name, pair in factors.items())
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
