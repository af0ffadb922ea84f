"""The updates of several adapters by site, read on a base whose weights stay in their files.

    dW_i (out, in)      the update of adapter i at a site: as factors B_i (out, r_i), A_i (r_i, in)
                        where it has them, of any method, rank and targets

A site of experts has one such update for each matrix, and each is composed on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapter import Adapter, load
from lorafold.bases import layer_of
from lorafold.core.anatomy import Anatomy
from lorafold.core.delta import Additive
from lorafold.core.matrices import module_at
from lorafold.errors import LorafoldError, as_one
from lorafold.inspecting.updates import matrix_names, unstacked
from lorafold.opening import Base
from lorafold.peft.saved import Saved

Factors = tuple[Tensor, Tensor]  # up (out, r), every scale included, and down (r, in), fp32
Change = Factors | Tensor  # dW: its factors, or the dense matrix (out, in)


@dataclass(frozen=True)
class Site:
    """One adapted module, or the matrices of experts, with the update of each adapter, None where
    an adapter has none there. `names` are those of its matrices.
    """

    path: str
    names: tuple[str, ...]
    updates: tuple[Additive | None, ...]

    @property
    def there(self) -> list[tuple[int, Additive]]:
        """The updates at this site, with the numbers of their adapters, from 0."""
        return [(i, update) for i, update in enumerate(self.updates) if update is not None]

    def changes(self) -> Iterator[tuple[str, dict[int, Change]]]:
        """Yield the name of each matrix, and its updates by the numbers of their adapters."""
        numbers = [i for i, _ in self.there]
        every = zip(*(changes_of(update) for _, update in self.there), strict=True)
        for name, own in zip(self.names, every, strict=True):
            yield name, dict(zip(numbers, own, strict=True))

    def joined(self, found: Sequence[Factors]) -> Factors:
        """The factors of all its matrices, of one rank, as a delta has them."""
        if self.names == (self.path,):
            return found[0]
        ups, downs = zip(*found, strict=True)
        return torch.stack(ups), torch.stack(downs)


@dataclass(frozen=True)
class Updates:
    """Adapters on one base, with short names."""

    model: nn.Module
    adapters: tuple[Adapter, ...]
    names: tuple[str, ...]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site that an adapter changes, in the order of the model's modules."""
        by_adapter = [adapter.own_deltas for adapter in self.adapters]
        modules = Anatomy.of(self.model).modules
        paths = [path for path, _ in modules if any(path in own for own in by_adapter)]
        numbers = {path: layer_of(module_at(self.model, path)).matrices for path in paths}
        updates: dict[str, Any] = {path: [own.get(path) for own in by_adapter] for path in paths}
        return tuple(
            Site(path, tuple(matrix_names(path, numbers[path])), tuple(updates[path]))
            for path in paths
        )


def read(base: Base, adapters: Sequence[Saved]) -> Updates:
    """Attach saved adapters to their base, whose weights stay in their files.

    Raises LorafoldError with every adapter that does not fit, is of another base, or has a change
    that is not added to a weight (a magnitude, a bias, a whole module, virtual tokens).
    """
    model, allowed = base.mapped().model, base.allow_other_base
    attached, problems = [], []
    for number, saved in enumerate(adapters, 1):
        try:
            attached.append(load(model, saved, f"adapter{number}", allow_other_base=allowed))
        except LorafoldError as e:
            problems.append(str(e))
            continue
        strange = {
            type(part).__name__: at
            for at, part in attached[-1].parts()
            if not isinstance(part, Additive)
        }
        if strange:
            found = ", ".join(
                f"{kind} (at {at or 'the whole model'})" for kind, at in strange.items()
            )
            problems.append(
                f"{saved}: found {found}, expected updates that are added to a weight; this adapter"
                " can't be composed with others"
            )
    if problems:
        raise LorafoldError(as_one(problems))
    return Updates(model, tuple(attached), names([saved.path for saved in adapters]))


def names(adapters: Sequence[str | Path]) -> tuple[str, ...]:
    """A name for each path: its last part, or the whole path where two have the same last part,
    with a number where an adapter is given twice.
    """
    paths = [Path(adapter) for adapter in adapters]
    short = [p.name if sum(q.name == p.name for q in paths) == 1 else str(p) for p in paths]
    return tuple(n if short.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(short, 1))


def dense(change: Change) -> Tensor:  # (out, in)
    """The update as one matrix."""
    return change[0] @ change[1] if isinstance(change, tuple) else change


@torch.no_grad()
def changes_of(update: Additive) -> list[Change]:
    """The update of each matrix in fp32: its factors, or a dense matrix if it has none."""
    factors = update.factors()
    if factors is None:
        return [*unstacked(update.delta().float())]
    return [*zip(*(unstacked(factor.float()) for factor in factors), strict=True)]
