"""The updates of several adapters by target module, and the arithmetic that combines them.

    dW_i (out, in)  the update of a matrix by adapter i; its factors are B_i (out, r_i) and
                    A_i (r_i, in) if it is low-rank
    sum             sum_i w_i dW_i; of factors [w_1 B_1, w_2 B_2 ...] [A_1; A_2 ...], which is exact
    disjoint mean   for each entry, the mean of the w_i dW_i that have the elected sign,
                    sign(sum_i w_i dW_i)                                              (TIES)
    trim            keeps the largest fraction `density` of the entries; the others become 0
                    (TIES, magnitude pruning)
    drop            keeps each entry with probability `density`, divided by `density`; the others
                    become 0                                                          (DARE)

    way               entries          joined by        weights    rank
    linear            all              sum              1/n        sum of the ranks, exact
    task-arithmetic   all              sum              1          sum of the ranks, exact
    svd               all              sum              1/n        largest of the ranks
    ties              largest fifth    disjoint mean    1          sum of the ranks
    dare              random half      sum              1/n        sum of the ranks
    dare-ties         random half      disjoint mean    1          sum of the ranks
    magnitude         largest fifth    sum              1/n        sum of the ranks

Task arithmetic: Ilharco et al. 2023, arXiv 2212.04089; TIES: Yadav et al. 2023, arXiv 2306.01708,
sec. 3; DARE: Yu et al. 2024, arXiv 2311.03099, eq. 1. TIES ranks the entries of the whole model,
`trim` the entries of each matrix, so that only one dense update is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lorafold.adapter import Adapter, load
from lorafold.core.anatomy import Anatomy
from lorafold.core.delta import Additive
from lorafold.core.expert_matrices import module_at
from lorafold.core.rounding import generator_of
from lorafold.errors import LorafoldError, join_problems
from lorafold.inspecting.updates import Factors, matrix_names, stacked, unstacked
from lorafold.layers import layer_of
from lorafold.ops.svd import best_of_rank, svd_of_product
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base

Change = Factors | Tensor  # dW: its factors, or the dense matrix (out, in)


@dataclass(frozen=True)
class ModuleUpdates:
    """A module's matrices, and each adapter's update (None if it does not change the module)."""

    path: str
    names: tuple[str, ...]
    updates: tuple[Additive | None, ...]

    @property
    def present(self) -> list[tuple[int, Additive]]:
        """(adapter number from 0, update) of each adapter that changes this module."""
        return [(i, update) for i, update in enumerate(self.updates) if update is not None]

    def changes(self) -> Iterator[tuple[str, dict[int, Change]]]:
        """Yields the name of each matrix, and its updates by adapter number."""
        numbers = [i for i, _ in self.present]
        every = zip(*(changes_of(update) for _, update in self.present), strict=True)
        for name, own in zip(self.names, every, strict=True):
            yield name, dict(zip(numbers, own, strict=True))

    def stacked(self, factors: Sequence[Factors]) -> Factors:
        return stacked(factors, () if self.names == (self.path,) else (len(factors),))


@dataclass(frozen=True)
class Updates:
    """Adapters that are attached to one base, with short unique names."""

    model: nn.Module
    adapters: tuple[Adapter, ...]
    names: tuple[str, ...]

    @cached_property
    def sites(self) -> tuple[ModuleUpdates, ...]:
        """All modules that an adapter changes, in the model's order."""
        by_adapter: list[Any] = [adapter.own_deltas for adapter in self.adapters]
        modules = Anatomy.of(self.model).modules
        paths = [path for path, _ in modules if any(path in own for own in by_adapter)]
        names = {p: matrix_names(p, layer_of(module_at(self.model, p)).matrices) for p in paths}
        return tuple(
            ModuleUpdates(path, tuple(names[path]), tuple(own.get(path) for own in by_adapter))
            for path in paths
        )

    def tracked(self, what: str, console: Console) -> Iterable[ModuleUpdates]:
        quiet = not console.is_terminal
        return track(self.sites, what, console=console, transient=True, disable=quiet)


def read_updates(base: Base, adapters: Sequence[SavedAdapter]) -> Updates:
    """Attaches saved adapters to their base, whose weights stay memory-mapped."""
    model, allowed = base.mapped().model, base.allow_other_base
    attached, problems = [], []
    for number, saved in enumerate(adapters, 1):
        try:
            attached.append(load(model, saved, f"adapter{number}", allow_other_base=allowed))
        except LorafoldError as e:
            problems.append(str(e))
            continue
        parts = attached[-1].parts()
        if other := [at or "the model" for at, part in parts if not isinstance(part, Additive)]:
            problems.append(
                f"{saved}: the update of {other[0]} is not added to a weight, so this adapter can't"
                " be composed with others"
            )
    if problems:
        raise LorafoldError(join_problems(problems))
    return Updates(model, tuple(attached), short_names([saved.path for saved in adapters]))


def short_names(adapters: Sequence[str | Path]) -> tuple[str, ...]:
    """A unique name for each path: its last part, the whole path, or the path with a number."""
    paths = [Path(adapter) for adapter in adapters]
    short = [p.name if sum(q.name == p.name for q in paths) == 1 else str(p) for p in paths]
    return tuple(n if short.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(short, 1))


def dense(change: Change) -> Tensor:  # (out, in)
    return change[0] @ change[1] if isinstance(change, tuple) else change


@torch.no_grad()
def changes_of(update: Additive) -> list[Change]:
    """The update of each matrix in fp32: its factors, or a dense matrix if it has none."""
    factors = update.factors()
    if factors is None:
        return [*unstacked(update.delta().float())]
    return [*zip(*(unstacked(factor.float()) for factor in factors), strict=True)]


# (dW, density, generator) -> dW with entries set to 0
Prune = Callable[[Tensor, float, torch.Generator], Tensor]
Join = Callable[[Sequence[Change]], Change]  # [w_i dW_i] -> their composition


def scaled(change: Change, weight: float) -> Change:
    return (weight * change[0], change[1]) if isinstance(change, tuple) else weight * change


def summed(changes: Sequence[Change]) -> Change:
    """The sum of updates: concatenated factors if all have factors, else dense."""
    factors = [change for change in changes if isinstance(change, tuple)]
    if len(factors) == len(changes):
        ups, downs = zip(*factors, strict=True)
        return torch.cat(ups, 1), torch.cat(downs, 0)
    return reduce(torch.add, map(dense, changes))


def disjoint_mean(changes: Sequence[Change]) -> Tensor:  # (out, in)
    """For each entry, the mean of the updates that have the sign of their sum (TIES, sec. 3)."""
    updates = torch.stack([dense(change) for change in changes])  # (n, out, in)
    elected = updates.sum(0).sign()
    agree = (updates.sign() == elected) & (elected != 0)
    return (updates * agree).sum(0) / agree.sum(0).clamp_min(1)


def trim(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps the largest entries of an update (out, in), and sets the others to 0; not random."""
    sizes = update.abs()
    kept = max(1, round(density * update.numel()))
    least = sizes.flatten().kthvalue(update.numel() - kept + 1).values
    return torch.where(sizes >= least, update, 0)


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps random entries of an update (any shape), divided by `density`, and sets the others to 0
    (DARE, eq. 1).
    """
    return torch.where(torch.rand(update.shape, generator=generator) < density, update / density, 0)


def truncate_rank(change: Change, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors with at most this rank: (up (out, r), down (r, in), |up down - dW|^2)."""
    if not isinstance(change, tuple):
        up, down = best_of_rank(change, min(rank, *change.shape))
        return up, down, (up @ down - change).double().square().sum().item()
    up, down = change
    if rank >= len(down):
        return up, down, 0.0
    u, s, vt = svd_of_product(up, down)
    root = s[:rank].sqrt()
    return (
        (u[:, :rank] * root).float(),
        (root[:, None] * vt[:rank]).float(),
        s[rank:].square().sum().item(),
    )


def inner(a: Change, b: Change) -> float:
    """<dW_a, dW_b> in fp64; for factors tr((B_a^T B_b) (A_b A_a^T))."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        (up_a, down_a), (up_b, down_b) = ((up.double(), down.double()) for up, down in (a, b))
        return ((up_a.t() @ up_b) * (down_a @ down_b.t())).sum().item()
    return (dense(a).double() * dense(b).double()).sum().item()


@dataclass(frozen=True)
class ComposeWay:
    """A rule for composing updates; default weights are 1/n if `mean`, else 1."""

    join: Join
    mean: bool
    rank: Callable[[Sequence[int]], int] = sum
    prune: Prune | None = None
    density: float | None = None

    @torch.no_grad()
    def at(
        self, site: ModuleUpdates, weights: Sequence[float], density: float | None, seed: int
    ) -> Iterator[Change]:
        generators = {i: generator_of(seed, f"{site.path}/{i}") for i, _ in site.present}
        for _, changes in site.changes():
            if (prune := self.prune) is not None and density is not None:
                changes = {i: prune(dense(c), density, generators[i]) for i, c in changes.items()}
            yield self.join([scaled(change, weights[i]) for i, change in changes.items()])


def rank_of(update: Additive, path: str) -> int:
    if (factors := update.factors()) is None:
        raise LorafoldError(
            f"{path}: the update is not a product of two factors, so it has no rank; pass --rank"
        )
    return factors[1].shape[-2]


RULES = {
    "linear": ComposeWay(summed, True),
    "task-arithmetic": ComposeWay(summed, False),
    "svd": ComposeWay(summed, True, max),
    "ties": ComposeWay(disjoint_mean, False, prune=trim, density=0.2),
    "dare": ComposeWay(summed, True, prune=drop, density=0.5),
    "dare-ties": ComposeWay(disjoint_mean, False, prune=drop, density=0.5),
    "magnitude": ComposeWay(summed, True, prune=trim, density=0.2),
}
