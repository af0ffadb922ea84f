"""The updates of several adapters, site by site, over a base whose weights stay in their files.

    dW_i (out, in) of adapter i at a site       as factors where it has them, whatever its method,
                                                rank and targets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapter import Adapter, load
from lorafold.bases import layer_of
from lorafold.core.anatomy import bare_modules
from lorafold.core.delta import Additive
from lorafold.errors import LorafoldError
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.sources import ModelSource

Factors = tuple[Tensor, Tensor]  # up (out, r), every scale included, and down (r, in), fp32
Change = Factors | Tensor  # dW as its factors, or as it is


@dataclass(frozen=True)
class Site:
    """One adapted module, and the update that each adapter makes there: None where it makes
    none.
    """

    path: str
    shape: tuple[int, int]  # (out, in)
    updates: tuple[Additive | None, ...]

    @property
    def there(self) -> list[tuple[int, Additive]]:
        """The updates that are made, with the numbers of their adapters."""
        return [(i, update) for i, update in enumerate(self.updates) if update is not None]


@dataclass(frozen=True)
class Updates:
    """Adapters by short names on one base."""

    model: nn.Module
    adapters: tuple[Adapter, ...]
    names: tuple[str, ...]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        by_adapter = [adapter.own_deltas for adapter in self.adapters]
        paths = [
            path for path, _ in bare_modules(self.model) if any(path in own for own in by_adapter)
        ]
        shapes = {path: layer_of(self.model.get_submodule(path)).shape for path in paths}
        updates: dict[str, Any] = {path: [own.get(path) for own in by_adapter] for path in paths}
        return tuple(Site(path, shapes[path], tuple(updates[path])) for path in paths)


def read(
    source: ModelSource,
    adapters: Sequence[str | Path],
    *,
    allow_other_base: bool = False,
    trust_remote_code: bool = False,
) -> Updates:
    """Lay saved adapters over the mapped_model of their base.

    LorafoldError lists those that are not readable, not of this base, or hold a change that is not
    added to a weight (a magnitude, a bias, a whole module, virtual tokens): such can't be composed.
    """
    model = mapped_model_of(source, trust_remote_code).model
    laid, problems = [], []
    for number, path in enumerate(adapters, 1):
        try:
            laid.append(load(model, path, f"adapter{number}", allow_other_base=allow_other_base))
        except LorafoldError as e:
            problems.append(str(e))
            continue
        strange = {
            type(part).__name__: at
            for at, part in laid[-1].parts()
            if not isinstance(part, Additive)
        }
        if strange:
            found = ", ".join(f"{kind} (as at {at or 'the root'})" for kind, at in strange.items())
            problems.append(
                f"{path}: found {found}, expected updates that are added to a weight; it can be"
                " merged, not composed"
            )
    if problems:
        raise LorafoldError("; ".join(problems))
    return Updates(model, tuple(laid), names(adapters))


def names(adapters: Sequence[str | Path]) -> tuple[str, ...]:
    """The last part of each path, or the whole path where two end alike, numbered where an adapter
    is given twice.
    """
    paths = [Path(adapter) for adapter in adapters]
    short = [p.name if sum(q.name == p.name for q in paths) == 1 else str(p) for p in paths]
    return tuple(n if short.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(short, 1))


def dense(change: Change) -> Tensor:  # (out, in)
    return change[0] @ change[1] if isinstance(change, tuple) else change


@torch.no_grad()
def change_of(update: Additive) -> Change:
    factors = update.factors()
    return update.delta().float() if factors is None else (factors[0].float(), factors[1].float())
