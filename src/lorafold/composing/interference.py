"""Interference between adapters: evaluations on each task, and the similarity of the updates of
each pair.

For each matrix and overall:

    cosine            <dW_a, dW_b> / (|dW_a| |dW_b|)
    shared output     |U_a^T U_b|^2 / min(r_a, r_b), U an orthonormal basis of the columns of B (phi
                      of Hu et al. 2021, arXiv 2106.09685, sec. 7.2, at full rank)
    shared input      the same for the rows of A; random subspaces share max(r_a, r_b) / n
    sign conflict     the fraction of entries among the largest fifth of both with different signs
                      (Yadav et al. 2023, arXiv 2306.01708, sec. 3); 1/2 at random

Means over matrices are weighted by |dW_a| |dW_b|.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorafold.adapter import load
from lorafold.composing.request import Composed, Job
from lorafold.composing.updates import Change, Updates, dense, inner, trim
from lorafold.core.attach import only
from lorafold.evaluation import Evaluation, EvaluationSettings, evaluate
from lorafold.files.templates import render_text
from lorafold.files.terminal import print_lines, text_table

TOP_FRACTION = 0.2  # the fraction of entries whose signs are compared, as in TIES


@dataclass(frozen=True)
class UpdateRelation:
    """The similarity of two updates, of one matrix or overall; `chance_*` are the values expected
    for random subspaces.
    """

    cosine: float
    shared_output: float | None
    shared_input: float | None
    chance_output: float | None
    chance_input: float | None
    sign_conflict: float
    norms: tuple[float, float]

    @property
    def weight(self) -> float:
        """The weight |dW_a| |dW_b| in means over matrices."""
        return self.norms[0] * self.norms[1]


@dataclass(frozen=True)
class Pair:
    """The similarity of two adapters, for each matrix that both change and overall; `overall` is
    None if there is no such matrix.
    """

    a: str
    b: str
    overall: UpdateRelation | None
    sites: dict[str, UpdateRelation]

    def __str__(self) -> str:
        worst = sorted(self.sites.items(), key=lambda one: one[1].cosine * one[1].weight)[:3]
        opposed = {path: one.cosine for path, one in worst if one.cosine < 0}
        return render_text("composing/pair.jinja", pair=self, all=self.overall, opposed=opposed)


def pairs_of(updates: Updates, console: Console) -> list[Pair]:
    """Compares every pair of adapters, with the dense updates of one matrix in memory at a time."""
    relations = defaultdict[tuple[int, int], dict[str, UpdateRelation]](dict)
    for site in updates.tracked("geometry", console):
        for name, changes in site.changes():
            for pair, relation in relations_of(changes).items():
                relations[pair][name] = relation
    names = updates.names
    return [
        Pair(names[i], names[j], overall(list(relations[i, j].values())), relations[i, j])
        for i, j in combinations(range(len(names)), 2)
    ]


@torch.no_grad()
def relations_of(changes: Mapping[int, Change]) -> dict[tuple[int, int], UpdateRelation]:
    """Compares every pair of updates of one matrix; keys are pairs of adapter numbers."""
    norms = {i: inner(change, change) ** 0.5 for i, change in changes.items()}
    largest = {
        i: trim(dense(change), TOP_FRACTION, torch.default_generator).sign().to(torch.int8)
        for i, change in changes.items()
    }
    relations = {}
    for i, j in combinations(changes, 2):
        a, b, norm = changes[i], changes[j], norms[i] * norms[j]
        signs = largest[i] * largest[j]
        conflict = int((signs < 0).sum()) / max(1, int((signs != 0).sum()))
        relations[i, j] = UpdateRelation(
            inner(a, b) / norm if norm else 0.0, *overlaps(a, b), conflict, (norms[i], norms[j])
        )
    return relations


def overlaps(a: Change, b: Change) -> tuple[float | None, float | None, float | None, float | None]:
    """The overlaps (0 to 1) of output and of input subspaces, and the overlaps expected for random
    subspaces; all None unless both updates have factors.
    """
    if not (isinstance(a, tuple) and isinstance(b, tuple)):
        return None, None, None, None
    (up_a, down_a), (up_b, down_b) = a, b
    rank = max(len(down_a), len(down_b))
    return (
        overlap(up_a, up_b),
        overlap(down_a.t(), down_b.t()),
        min(1.0, rank / len(up_a)),
        min(1.0, rank / down_a.shape[1]),
    )


def overlap(a: Tensor, b: Tensor) -> float:  # (n, r_a), (n, r_b)
    """|Q_a^T Q_b|^2 / min(r_a, r_b), with orthonormal bases Q of the columns: 0 to 1."""
    qa, qb = (torch.linalg.qr(x.double()).Q for x in (a, b))
    return (qa.t() @ qb).square().sum().item() / min(qa.shape[1], qb.shape[1])


def overall(sites: Sequence[UpdateRelation]) -> UpdateRelation | None:
    if not sites:
        return None
    squares = ([norm**2 for norm in of] for of in zip(*(m.norms for m in sites), strict=True))
    first, second = (sum(of) ** 0.5 for of in squares)

    def mean(name: str) -> float | None:
        known = [(value, m.weight) for m in sites if (value := getattr(m, name)) is not None]
        total = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / total if total else None

    cosine = sum(m.cosine * m.weight for m in sites) / (first * second or 1)
    shared = ("shared_output", "shared_input", "chance_output", "chance_input")
    means, conflict = {name: mean(name) for name in shared}, mean("sign_conflict") or 0.0
    return UpdateRelation(cosine, **means, sign_conflict=conflict, norms=(first, second))


@dataclass(frozen=True)
class Interference:
    """Evaluations by task and by active adapter, and the similarity of each pair of adapters."""

    tasks: dict[str, dict[str, Evaluation]]
    pairs: list[Pair]

    def as_json(self) -> dict[str, Any]:
        """All figures: the evaluations under `tasks`, the pairs of adapters under `geometry`."""
        tasks = {
            task: {name: found.as_json() for name, found in by_name.items()}
            for task, by_name in self.tasks.items()
        }
        return {"tasks": tasks, "geometry": [*map(asdict, self.pairs)]}

    def __str__(self) -> str:
        def cell(found: Evaluation) -> str:
            exact = "" if found.exact_match is None else f", exact {found.exact_match:.1%}"
            return f"loss {found.loss:.4f}{exact}"

        names = next(iter(self.tasks.values()))
        lines = [[name, *(cell(task[name]) for task in self.tasks.values())] for name in names]
        return text_table(["", *self.tasks], lines) + "\n".join(map(str, self.pairs))


def measure(job: Job, composed: Mapping[str, Composed]) -> Interference:
    """Evaluates the base, the adapters and the compositions on every task of the request, and
    compares each pair of adapters.
    """
    model, tokenizer = job.opened()
    active: dict[str, Sequence[str]] = {"base": ()}
    signs = zip(job.updates.names, job.updates.adapters, strict=True)
    for number, (name, adapter) in enumerate(signs, 1):
        own = [f"adapter{n}" for n in range(1 if adapter.over else number, number + 1)]
        active[name if name != "base" else "base (adapter)"] = own
    for way, made in composed.items():
        # the adapters' fingerprints were checked when they were read
        load(model, made.out, f"composed-{way}", allow_other_base=True)
        active[way if way not in active else f"{way} (composed)"] = (f"composed-{way}",)
    console, request = job.console, job.request
    tracked = console if console.is_terminal else None
    length = request.recipe.max_length
    settings = EvaluationSettings(completions=request.completions)
    tasks = defaultdict[str, dict[str, Evaluation]](dict)
    for task, rows in request.tasks.items():
        for name, chosen in active.items():
            print_lines(console, f"{task}: {name}")
            with only(model, *chosen):
                tasks[task][name] = evaluate(model, tokenizer, rows, length, settings, tracked)
    return Interference(dict(tasks), pairs_of(job.updates, console))
