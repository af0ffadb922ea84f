"""What may keep a behaviour when a model is tuned further: one line each.

    lay: (tuning's updates, alignment's updates) -> factors of what is laid over the stack
    mixed: whether as many refusals as benign examples are among the examples

A defence without `lay` leaves the tuning as it was trained. To add one, add a line to DEFENCES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorafold.adapter import attach
from lorafold.core.delta import put
from lorafold.core.targets import Matches
from lorafold.inspecting.updates import site_of, stacked
from lorafold.methods.lora import of_ranks
from lorafold.undoing.subspaces import Factors, Updates, factors_of, off

if TYPE_CHECKING:
    from torch import nn

NAME = "laid"


@dataclass(frozen=True)
class Defence:
    """What is done, in words, and how."""

    about: str
    lay: Callable[[Updates, Updates], Mapping[str, Factors]] | None = None
    mixed: bool = False


def projected(tuning: Updates, alignment: Updates) -> dict[str, Factors]:
    """The tuning without the alignment's directions: up (out, r), down (r, in) by site."""
    return {path: off(update, alignment.get(path)) for path, update in tuning.items()}


def halved(tuning: Updates, alignment: Updates) -> dict[str, Factors]:
    """Half of the tuning: up (out, r), down (r, in) by site."""
    return {path: (up / 2, down) for path, (up, down) in _all_factors(tuning).items()}


def readded(tuning: Updates, alignment: Updates) -> dict[str, Factors]:
    """The tuning and the alignment's update once more: up (out, r + r'), down (r + r', in) by site.
    """
    one, other = _all_factors(tuning), _all_factors(alignment)
    both = {path: [all_[path] for all_ in (one, other) if path in all_] for path in one | other}
    return {
        path: (torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts]))
        for path, parts in both.items()
    }


def _all_factors(updates: Updates) -> dict[str, Factors]:
    return {path: factors_of(update) for path, update in updates.items()}


DEFENCES = {
    "none": Defence("the tuning as it was trained"),
    "halved": Defence("half of the tuning's update, which a defence has to beat", halved),
    "projected": Defence("the tuning's update off the alignment's subspaces", projected),
    "mixed": Defence("as many refusals as benign examples among the examples", mixed=True),
    "readded": Defence("the alignment's update laid over the tuning once more", readded),
}


@contextmanager
def laid(model: nn.Module, factors: Mapping[str, Factors]) -> Iterator[None]:
    """A context in which updates lie over the active adapters, as LoRA.

    Args:
        factors: up (out, r) and down (r, in) by module path, or by the names of all matrices of
            experts; r = 0 changes nothing.
    """
    sites: dict[str, list[Factors]] = {}
    for name, pair in factors.items():
        sites.setdefault(site_of(name), []).append(pair)
    every = {path: own[0] if path in factors else stacked(own) for path, own in sites.items()}
    there = {path: pair for path, pair in every.items() if pair[1].shape[-2]}
    if not there:
        yield
        return
    spec = of_ranks({path: down.shape[-2] for path, (_, down) in there.items()})
    adapter = attach(model, spec, Matches({path: (path,) for path in there}), NAME)
    try:
        for path, delta in adapter.own_deltas.items():
            for name, value in zip(("B", "A"), there[path], strict=True):
                put(delta, name, value)
        yield
    finally:
        adapter.detach()
