"""A composition as one LoRA in PEFT's format: every site has the rank that its change needs, and
the error of the cut is stated.

    error = sqrt(sum_sites |up down - dW|^2 / sum_sites |dW|^2)         0 where nothing was cut
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.progress import track
from torch import nn

from lorafold.adapter import attach
from lorafold.composing.arithmetic import cut, inner
from lorafold.composing.job import Composed, Job
from lorafold.composing.rules import RULES, Rule
from lorafold.composing.updates import Factors
from lorafold.methods.lora import of_ranks


def compose(rule: str, job: Job, out: Path) -> Composed:
    """Apply a rule of the table, under the request's weights or its own, and write the adapter."""
    by, n = RULES[rule], len(job.updates.adapters)
    return apply(by, rule, job.request.weights or (by.weight(n),) * n, job, out)


def apply(by: Rule, word: str, weights: tuple[float, ...], job: Job, out: Path) -> Composed:
    """Apply a rule at every site. The record has the composition's word."""
    request, density = job.request, by.share(job.request.density)
    factors: dict[str, Factors] = {}
    lost = total = 0.0
    for site in track(
        job.updates.sites,
        word,
        console=job.console,
        transient=True,
        disable=not job.console.is_terminal,
    ):
        change = by.at(site, weights, density, request.seed)
        up, down, error = cut(change, by.rank_at(site, request.rank))
        factors[site.path] = (up, down)
        lost, total = lost + error, total + inner(change, change)
    error = (lost / total) ** 0.5 if total else 0.0
    write(
        job,
        factors,
        out,
        {
            "how": word,
            "weights": weights,
            "density": density,
            "seed": request.seed,
            "truncation_error": error,
        },
    )
    return Composed(weights, error, str(out))


def write(job: Job, factors: Mapping[str, Factors], out: Path, about: Mapping[str, object]) -> None:
    spec = of_ranks({path: len(down) for path, (_, down) in factors.items()})
    adapter = attach(job.updates.model, spec, job.targets(), "composed")
    for path, delta in adapter.own_deltas.items():
        up, down = factors[path]
        delta.B, delta.A = nn.Parameter(up), nn.Parameter(down)
    job.save(adapter, out, about)
