"""A composition written as one LoRA in PEFT's format, in which each site has a rank of its own.

    error = sqrt(sum_sites |up down - dW|^2 / sum_sites |dW|^2)         0 where no rank was cut
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


def arithmetic(rule: str, job: Job, out: Path) -> Composed:
    """Compose by a rule with its own weights, unless the request has some, and write the adapter.

    Args:
        rule: A name in RULES.
        job: The adapters, and the request.
        out: The directory to write.

    Raises LorafoldError where a rank is needed that an update does not have.
    """
    by, n = RULES[rule], len(job.updates.adapters)
    return apply(by, rule, job.request.weights or (by.weight(n),) * n, job, out)


def apply(by: Rule, way: str, weights: tuple[float, ...], job: Job, out: Path) -> Composed:
    """Apply a rule at every site and write the adapter.

    Args:
        way: The name of the way of composing, for the record.
        weights: One for each adapter.
        job: The adapters, and the request for rank, density and seed.
        out: The directory to write.
    """
    request, density = job.request, by.share(job.request.density)
    factors: dict[str, Factors] = {}
    lost = total = 0.0
    for site in track(
        job.updates.sites,
        way,
        console=job.console,
        transient=True,
        disable=not job.console.is_terminal,
    ):
        rank, found = by.rank_at(site, request.rank), []
        for change in by.at(site, weights, density, request.seed):
            up, down, error = cut(change, rank)
            found.append((up, down))
            lost, total = lost + error, total + inner(change, change)
        factors[site.path] = site.joined(found)
    error = (lost / total) ** 0.5 if total else 0.0
    write_lora(
        job,
        factors,
        out,
        {
            "how": way,
            "weights": weights,
            "density": density,
            "seed": request.seed,
            "truncation_error": error,
        },
    )
    return Composed(weights, error, str(out))


def write_lora(job: Job, factors: Mapping[str, Factors], out: Path, about: Mapping[str, object]) -> None:
    """Write factors as a LoRA adapter.

    Args:
        job: The adapters that it was made from.
        factors: up (*matrices, out, r) and down (*matrices, r, in) of each site.
        out: The directory to write.
        about: How it was composed, for the record.
    """
    spec = of_ranks({path: down.shape[-2] for path, (_, down) in factors.items()})
    adapter = attach(job.updates.model, spec, job.targets(), "composed")
    for path, delta in adapter.own_deltas.items():
        up, down = factors[path]
        delta.B, delta.A = nn.Parameter(up), nn.Parameter(down)
    job.save(adapter, out, about)
