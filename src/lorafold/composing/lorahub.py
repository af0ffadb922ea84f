"""LoRAHub: the weights of a sum, searched without gradients on a few examples.

    min over w in [-1.5, 1.5]^n of  mean over tasks of loss(W + sum_i w_i dW_i) + l1 mean_i |w_i|
    by CMA-ES, from 1/n

Huang et al. 2023, arXiv 2307.13269, sec. 3.2-3.3, with its bounds, its l1 = 0.05 and its 40
evaluations. It sums the factors apart, (sum w_i B_i) (sum w_i A_i), which asks for equal ranks and
brings products of strange halves; here the updates themselves are summed. The optimiser is pycma
(Hansen 2016, arXiv 1604.00772). The examples see forward passes alone, so a packed base will do.
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
from lorafold.composing import lora, mixture
from lorafold.composing.job import Composed, Job
from lorafold.composing.rules import RULES
from lorafold.core.attach import only
from lorafold.data.examples import encode
from lorafold.evaluation import held_out_loss
from lorafold.step.losses import Completions

BOUND, L1, SPREAD = 1.5, 0.05, 0.3
SHOTS = 16  # examples of each task that are looked at


def compose(job: Job, out: Path) -> Composed:
    """The sum under the weights that were found."""
    return lora.apply(RULES["linear"], "lorahub", search(job), job, out)


def search(job: Job) -> tuple[float, ...]:
    """The best weights found, at no higher a cost than the average.

    LorafoldError for rows that can't be encoded.
    """
    model, tokenizer = job.opened()
    tasks = [
        encode(rows[:SHOTS], tokenizer, job.request.recipe.max_length).examples
        for rows in job.examples.values()
    ]
    loss = Completions(model, packed=False, pad_id=0)
    with TemporaryDirectory() as folder:
        mixture.write(job, Path(folder) / "search", "global")
        # checked when it was read
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
        bars.update(bar, completed=done, description=f"lorahub, least cost {least:.4f}")
        if not job.console.is_terminal and done % 10 == 0:
            job.console.print(
                f"lorahub {done}/{total}: least cost {least:.4f}", highlight=False, markup=False
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
    """CMA-ES from 1/n each, which is tried as well; as many evaluations as make whole generations.

    `tried` hears of each: how many there were, and the least cost so far.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plots that are not drawn, and of one dimension
        import cma

        # a seed of 0 is the clock
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
