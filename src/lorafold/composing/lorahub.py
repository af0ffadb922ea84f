"""LoRAHub: the weights of a sum of updates, found by a search without gradients on a few examples.

    min over w in [-1.5, 1.5]^n of  mean over tasks of loss(W + sum_i w_i dW_i) + l1 mean_i |w_i|
    by CMA-ES, from 1/n

Huang et al. 2023, arXiv 2307.13269, sec. 3.2-3.3, with its bounds, its l1 = 0.05 and its 40
evaluations. The paper sums the factors separately, (sum w_i B_i) (sum w_i A_i), which needs equal
ranks and adds products B_i A_j of different adapters; here the updates are summed. The optimizer is
pycma (Hansen 2016, arXiv 1604.00772). The search needs forward passes only, so the base may be
quantized.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from rich.progress import Progress

from lorafold.adapter import load
from lorafold.composing.job import Composed, Job
from lorafold.composing.rules import RULES
from lorafold.core.attach import only
from lorafold.data.examples import encode
from lorafold.evaluation import held_out_loss
from lorafold.step.losses import Completions

BOUND, L1, SPREAD = 1.5, 0.05, 0.3
SHOTS = 16  # rows of each task that the search measures on


def lorahub(job: Job, out: Path) -> Composed:
    """Write the sum of the updates under the best weights. Raises LorafoldError as `search`."""
    return apply(RULES["linear"], "lorahub", search(job), job, out)


def search(job: Job) -> tuple[float, ...]:
    """The best weights found; their cost is at most that of 1/n each.

    Raises LorafoldError without rows to learn from and for rows that can't be encoded.
    """
    model, tokenizer = job.opened()
    tasks = [
        encode(rows[:SHOTS], tokenizer, job.request.recipe.max_length).examples
        for rows in job.examples.values()
    ]
    loss = Completions(model, packed=False, pad_id=0)
    with TemporaryDirectory() as folder:
        write_mixture(job, Path(folder) / "search", "global")
        # the fingerprints of its parts were checked when they were read
        adapter = load(model, Path(folder) / "search", "search", allow_other_base=True)
    (gates,) = adapter.parameters()

    def cost(weights: list[float]) -> float:
        with torch.no_grad():
            gates.copy_(torch.tensor(weights))
        return fmean(held_out_loss(loss, examples) for examples in tasks) + L1 * fmean(
            map(abs, weights)
        )

    total = job.request.evaluations

    def tried(done: int, least: float) -> None:
        bars.update(bar, completed=done, description=f"lorahub, lowest cost {least:.4f}")
        if not job.console.is_terminal and done % 10 == 0:
            job.console.print(
                f"lorahub {done}/{total}: lowest cost {least:.4f}", highlight=False, markup=False
            )

    try:
        with (
            only(model, "search"),
            Progress(
                console=job.console, transient=True, disable=not job.console.is_terminal
            ) as bars,
        ):
            bar = bars.add_task("lorahub", total=total)
            return minimized(cost, len(gates), total, job.request.seed, tried)
    finally:
        adapter.detach()


def minimized(
    cost: Callable[[list[float]], float],
    n: int,
    evaluations: int,
    seed: int,
    tried: Callable[[int, float], None],
) -> tuple[float, ...]:
    """The weights of the lowest cost that CMA-ES finds, starting from 1/n each.

    Args:
        cost: The function to minimize, of n weights.
        n: The number of weights.
        evaluations: How often `cost` is called, rounded up to whole generations.
        seed: The seed of the search.
        tried: Called after each evaluation, with their number and the lowest cost so far.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cma warns about missing plots and about one dimension
        import cma

        # cma takes a seed of 0 as a request for a random one
        options = {"bounds": [-BOUND, BOUND], "seed": seed + 1, "verbose": -9}
        strategy = cma.CMAEvolutionStrategy([1 / n] * n, SPREAD, options)
        strategy.inject([[1 / n] * n], force=True)
        done, least = 0, math.inf
        while done < evaluations and not strategy.stop():
            points, costs = strategy.ask(), []
            for point in points:
                costs.append(cost([float(x) for x in point]))
                done, least = done + 1, min(least, costs[-1])
                tried(done, least)
            strategy.tell(points, costs)
    return tuple(float(x) for x in strategy.result.xbest)
