"""A mixture of adapters: their frozen factors, weighted by gates that a training run learns.

The factors are written as one adapter whose gates are all 1/n, and the run starts from it. So a
mixture is trained, saved, evaluated and merged like any other adapter.
`lorafold.methods.parts.mixture` has the equations and papers.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lorafold.adapter import attach, load
from lorafold.composing.arithmetic import cut, inner
from lorafold.composing.job import Composed, Job
from lorafold.composing.rules import rank_of
from lorafold.errors import Interrupted
from lorafold.methods.parts.mixture import Gating, Mixture
from lorafold.peft.saved import Saved
from lorafold.recipe.recipe import Recipe
from lorafold.training import run

RECIPE = Recipe(steps=50)  # there are few gates to learn


def mixture(job: Job, out: Path) -> Composed:
    """Train the gates on all rows to learn from and write the mixture.

    Raises LorafoldError as `train`, and Interrupted with nothing written.
    """
    request, rows = job.request, list(chain.from_iterable(job.examples.values()))
    base = request.base.stored_as_trained(request.adapters)
    recipe = request.recipe.model_copy(update={"storage": base.storage, "seed": request.seed})
    with TemporaryDirectory() as folder:
        start, trained = Path(folder) / "start", Path(folder) / "trained"
        error = write_mixture(job, start, request.gates)
        asked = run.Request(
            base,
            trained,
            recipe,
            rows,
            ", ".join(job.examples),
            init_adapter=start,
        )
        try:
            run.train(asked, job.console)
        except Interrupted as stop:
            raise Interrupted(
                "stopped during the training of the gates; nothing was written", stop.code
            ) from None
        saved = Saved.open(trained)
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
    """Write the mixture with which training starts. Returns the share of the norm of the updates
    that was lost when they were cut to the request's rank.

    Args:
        job: The adapters.
        out: The directory to write.
        gates: What the gates depend on: global, layer or token.
    """
    updates = job.updates
    adapter = attach(updates.model, Mixture(updates.names, gates), job.targets(), "mixture")
    sites = {site.path: site for site in updates.sites}
    lost = total = 0.0
    for path, delta in adapter.own_deltas.items():
        site, found, owners = sites[path], list[tuple[Tensor, Tensor]](), list[Tensor]()
        ranks = {i: job.request.rank or rank_of(update, path) for i, update in site.there}
        for _, changes in site.changes():
            parts: list[tuple[Tensor, Tensor]] = []
            for i, change in changes.items():
                up, down, error = cut(change, ranks[i])
                lost, total = lost + error, total + inner(change, change)
                parts.append((up, down))
            ups, downs = zip(*parts, strict=True)
            owners = [torch.full((len(d),), i) for i, d in zip(changes, downs, strict=True)]
            found.append((torch.cat(ups, 1), torch.cat(downs, 0)))
        delta.up, delta.down = site.joined(found)
        delta.owner = torch.cat(owners)
    job.save(adapter, out, {"how": "mixture", "gates": gates})
    return (lost / total) ** 0.5 if total else 0.0
