"""The methods of composing adapters: arithmetic on updates, mixture and LoraHub.

    error = sqrt(sum_sites |up down - dW|^2 / sum_sites |dW|^2)         0 if no rank was truncated

mixture: frozen factors with trained gates (`methods.mixture`).

lorahub: a weighted sum of updates, whose weights are optimized without gradients on a few examples.

    min over w in [-1.5, 1.5]^n of  mean over tasks of loss(W + sum_i w_i dW_i) + l1 mean_i |w_i|
    by CMA-ES (pycma; Hansen 2016, arXiv 1604.00772), starting from 1/n

Huang et al. 2023, arXiv 2307.13269, sec. 3.2-3.3. The paper sums the factors, (sum w_i B_i) (sum
w_i A_i), which adds products B_i A_j of different adapters; lorafold sums the updates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from rich.progress import Progress

from lorafold.adapter import attach, load
from lorafold.composing.request import Composed, Job
from lorafold.composing.updates import RULES, inner, rank_of, truncate_rank
from lorafold.core.attach import only
from lorafold.core.targets import Matches
from lorafold.data.examples import encode
from lorafold.errors import Interrupted
from lorafold.evaluation import held_out_loss
from lorafold.inspecting.updates import add_lora
from lorafold.methods.mixture import Gating, Mixture
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.recipe.recipe import Recipe
from lorafold.training import run
from lorafold.training_step.losses import CompletionLoss


def arithmetic(
    rule: str, job: Job, out: Path, name: str = "", weights: tuple[float, ...] = ()
) -> Composed:
    """Applies a rule to every target module and writes the adapter; `name` is recorded in place of
    the rule's name.
    """
    by, request, n = RULES[rule], job.request, len(job.updates.adapters)
    way, density = name or rule, (request.density or by.density) if by.prune else None
    weights = weights or request.weights or (1 / n if by.mean else 1.0,) * n
    factors = {}
    squared_error = squared_norm = 0.0
    for site in job.updates.tracked(way, job.console):
        parts = []
        rank = request.rank or by.rank([rank_of(update, site.path) for _, update in site.present])
        for change in by.at(site, weights, density, request.seed):
            up, down, error = truncate_rank(change, rank)
            parts.append((up, down))
            squared_error += error
            squared_norm += inner(change, change)
        factors[site.path] = site.stacked(parts)
    error = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    about = {
        "how": way,
        "weights": weights,
        "density": density,
        "seed": request.seed,
        "truncation_error": error,
    }
    job.save(add_lora(job.updates.model, factors, "composed"), out, about)
    return Composed(weights, error, str(out))


RECIPE = Recipe(steps=50)  # there are few gates to learn


def mixture(job: Job, out: Path) -> Composed:
    request, rows = job.request, list(chain.from_iterable(job.examples.values()))
    base = request.base.stored_as_trained(request.adapters)
    recipe = request.recipe.model_copy(update={"storage": base.storage, "seed": request.seed})
    with TemporaryDirectory() as folder:
        start, trained = Path(folder) / "start", Path(folder) / "trained"
        error = write_mixture(job, start, request.gates)
        training = run.RunRequest(
            base, trained, recipe, rows, ", ".join(job.examples), init_adapter=start
        )
        try:
            run.train(training, job.console)
        except Interrupted as stop:
            raise Interrupted(
                "stopped during the training of the gates; nothing was written", stop.code
            ) from None
        saved = SavedAdapter.open(trained)
        # the fingerprints of its parts were checked when they were read
        adapter = load(job.updates.model, saved, "mixture", allow_other_base=True)
        weights = tuple(next(adapter.parameters()).tolist()) if request.gates == "global" else None
        about = {
            "how": "mixture",
            "gates": request.gates,
            "weights": weights,
            "truncation_error": error,
        }
        job.save(adapter, out, about, saved.record)
    return Composed(weights, error, str(out))


def write_mixture(job: Job, out: Path, gates: Gating) -> float:
    """Writes the initial mixture for training; returns the truncation error."""
    updates = job.updates
    sites = {site.path: site for site in updates.sites}
    targets = Matches({path: (path,) for path in sites})
    adapter = attach(updates.model, Mixture(updates.names, gates), targets, "mixture")
    squared_error = squared_norm = 0.0
    for path, delta in adapter.own_deltas.items():
        site, factors = sites[path], []
        ranks = {i: job.request.rank or rank_of(update, path) for i, update in site.present}
        for _, changes in site.changes():
            cuts = [truncate_rank(change, ranks[i]) for i, change in changes.items()]
            ups, downs, errors = zip(*cuts, strict=True)
            squared_error = sum(errors, squared_error)
            squared_norm = sum((inner(change, change) for change in changes.values()), squared_norm)
            factors.append((torch.cat(ups, 1), torch.cat(downs, 0)))
        delta.up, delta.down = site.stacked(factors)
        ends = zip(ranks, downs, strict=True)  # the same for each matrix of a site
        delta.owner = torch.cat([torch.full((len(down),), i) for i, down in ends])
    job.save(adapter, out, {"how": "mixture", "gates": gates})
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


BOUND, L1_WEIGHT, INITIAL_STEP = 1.5, 0.05, 0.3
ROWS_PER_TASK = 16  # rows of each task in the search's cost


def lorahub(job: Job, out: Path) -> Composed:
    return arithmetic("linear", job, out, "lorahub", search(job))


def search(job: Job) -> tuple[float, ...]:
    """The best weights found; their cost is at most the cost of equal weights 1/n."""
    model, tokenizer = job.opened()
    tasks = [
        encode(rows[:ROWS_PER_TASK], tokenizer, job.request.recipe.max_length).examples
        for rows in job.examples.values()
    ]
    loss = CompletionLoss(model, packed=False, pad_id=0)
    with TemporaryDirectory() as folder:
        write_mixture(job, Path(folder) / "search", "global")
        # the fingerprints of its parts were checked when they were read
        adapter = load(model, Path(folder) / "search", "search", allow_other_base=True)
    (gates,) = adapter.parameters()

    def cost(weights: list[float]) -> float:
        with torch.no_grad():
            gates.copy_(torch.tensor(weights))
        return fmean(held_out_loss(loss, examples) for examples in tasks) + L1_WEIGHT * fmean(
            map(abs, weights)
        )

    total, console = job.request.evaluations, job.console
    quiet = not console.is_terminal

    def report(done: int, lowest_cost: float) -> None:
        cost = f"lowest cost {lowest_cost:.4f}"
        bars.update(bar, completed=done, description=f"lorahub, {cost}")
        if quiet and done % 10 == 0:
            console.print(f"lorahub {done}/{total}: {cost}", highlight=False, markup=False)

    try:
        with (
            only(model, "search"),
            Progress(console=console, transient=True, disable=quiet) as bars,
        ):
            bar = bars.add_task("lorahub", total=total)
            return minimize(cost, len(gates), total, job.request.seed, report)
    finally:
        adapter.detach()


def minimize(
    cost: Callable[[list[float]], float],
    n: int,
    evaluations: int,
    seed: int,
    report: Callable[[int, float], None],
) -> tuple[float, ...]:
    """The weights with the lowest cost that CMA-ES finds, starting from 1/n each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cma warns about missing plots and about one dimension
        import cma

        # for a seed of 0, cma chooses a random seed
        options = {"bounds": [-BOUND, BOUND], "seed": seed + 1, "verbose": -9}
        strategy = cma.CMAEvolutionStrategy([1 / n] * n, INITIAL_STEP, options)
        strategy.inject([[1 / n] * n], force=True)
        done, lowest_cost = 0, math.inf
        while done < evaluations and not strategy.stop():
            points, costs = strategy.ask(), []
            for point in points:
                costs.append(cost([float(x) for x in point]))
                done, lowest_cost = done + 1, min(lowest_cost, costs[-1])
                report(done, lowest_cost)
            strategy.tell(points, costs)
    return tuple(float(x) for x in strategy.result.xbest)
