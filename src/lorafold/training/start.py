"""How a run starts: its method prepares a fresh adapter, or a checkpoint restores the tensors, the
optimizer and the random state of a run that was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from lorafold.adapter import Adapter
from lorafold.core.delta import put
from lorafold.data.batches import Feed
from lorafold.data.control_tokens import without_note
from lorafold.data.stored import Rows
from lorafold.errors import LorafoldError
from lorafold.evaluation import Measured
from lorafold.machine.processes import Processes
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.objective import Objective
from lorafold.recipe.recipe import FEW, STEPS, Recipe
from lorafold.rewards.naming import REWARDS, adapter_in
from lorafold.step.adamw import described, make_optimizer, pick
from lorafold.step.losses import Loss
from lorafold.step.optim import param_groups, rates, restore_optimizer, restore_rng, sum_in_fp32
from lorafold.step.replicated import Replicated
from lorafold.training.checkpoint import FILES, Progress, RunDirectory
from lorafold.training.loop import Job
from lorafold.training.request import Request
from lorafold.training.setup import Setup

# A resumed run may change these fields: they decide what is watched and kept, not what is learned.
FREE_ON_RESUME = {"save_every", "eval_every", "keep", "trackers", "strategy"}
WHEN_MEASURED = {"save_every", "eval_every"}  # what is learned where a run ends by what is measured
LOOKED_AT = 8  # steps, for what their rows have in common
HELD_OUT = "eval_data"  # whose losses choose the best step


def prepare(
    setup: Setup,
    adapter: Adapter,
    loss: Loss,
    feed: Feed,
    held_out: Callable[[], Measured] | None,
    console: Console,
    layout: Replicated,
) -> tuple[Job, Progress]:
    """The job of the training loop, and how far it has come: a fresh run or a resumed one.

    Args:
        setup: Its request may say to resume: then the run's last checkpoint is loaded, if there is
            one.
        adapter: Attached to the model of `loss`.
        loss: On the run's device.
        feed: The examples to train on.
        held_out: Measures on held-out examples.
        console: For the optimizer, the learning rates and the step from which a run is resumed.
        layout: Of the model, which is divided already if it is to be.

    Raises LorafoldError where the run to resume had another recipe, model or data, other files, or
    other modules to adapt.
    """
    request, processes, where = setup.request, setup.processes, setup.request.base.where
    recipe, run, spec = request.recipe, RunDirectory(request.out), adapter.spec
    identity = identity_of(setup, adapter)
    progress, state = Progress(), None
    resume = request.resume and run.path.exists()
    if request.resume and not resume:
        told = f"{run.path}: no run to resume, this one starts from the beginning"
        console.print(told, soft_wrap=True)
    if resume:
        judged, judges = run.written(REWARDS) or {}, identity.get(REWARDS, {})
        others = [name for name, digest in judged.items() if judges.get(name) != digest]
        if others and judged.keys() == judges.keys() and not any(map(adapter_in, others)):
            identity[REWARDS] = judged  # as one that failed and was mended is
            told = f"reward {', '.join(others)}: changed, and judges from here on as it is now"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        run.check(identity)
        if checkpoints := run.checkpoints():
            progress, tensors, state = run.load(checkpoints[max(checkpoints)])
            loss.counts |= progress.counts
            check_sites(run, adapter, tensors)
            with layout.apart():
                adapter.load_state_dict(tensors, layout.owns)
    else:
        if processes.first:
            run.start(identity)
        spec.prepare(adapter.own_deltas, partial(sample_losses, loss, feed, recipe))
        take_first(adapter, processes)
    lr_b = spec.lr_b and spec.lr_b * (loss.pace_up or loss.pace)
    lr = recipe.lr or spec.lr * loss.pace
    whole = None if recipe.lr or spec.lr_whole is None else spec.lr_whole * loss.pace
    groups = param_groups(
        adapter.parts(), lr, recipe.lr_b or lr_b or lr, not recipe.weight_decay, whole
    )
    sum_in_fp32(adapter.model)
    layout.share_out(p for group in groups for p in group["params"])
    parts = processes.count if layout.divides else 1
    chosen = pick(recipe.optimizer, progress.optimizer, groups, where, processes, parts)
    progress.optimizer = chosen.name
    for line in (described(chosen, groups, recipe.seed, parts), rates(groups, lr)):
        console.print(line, highlight=False, soft_wrap=True)
    optimizer = make_optimizer(chosen.name, groups, recipe)
    if state is not None:
        own = {k: v for k, v in state.items() if not k.startswith("rng.")}
        with layout.apart():
            restore_optimizer(optimizer, own, layout.updates)
        restore_rng(state)
    if resume:
        console.print(f"resuming after step {progress.step} of {feed.steps}", highlight=False)
    elif recipe.stops and held_out is None and feed.steps == STEPS:
        told = "found no held-out rows to end by; --eval-fraction 0.1 holds some out"
        console.print(f"epochs auto: {feed.steps} steps, {told}", highlight=False, soft_wrap=True)
    elif recipe.steps is None and feed.steps < FEW:
        less = "" if held_out else ", and --eval-fraction 0.1 ends where they no longer help"
        console.print(
            f"steps: {feed.steps}, few to learn by: --epochs auto takes {STEPS}{less}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return Job(
        adapter, loss, optimizer, where, processes, feed, held_out, recipe, run, feed.steps, layout,
    ), progress  # fmt: skip


def take_first(adapter: Adapter, processes: Processes) -> None:
    """Have all processes begin with what process 0 prepared: where another one rounds otherwise,
    its method may choose other entries, and of each weight another number.
    """
    deltas = adapter.deltas
    own = {path: delta.state_dict() for path, delta in deltas.items()}
    sizes = {path: {name: t.shape for name, t in state.items()} for path, state in own.items()}
    for path, found in processes.once(lambda: sizes).items():
        for name, shape in found.items():
            if shape != sizes[path][name]:
                put(deltas[path], name, own[path][name].new_empty(shape))
    processes.same([p.detach() for p in adapter.tensors()])


def in_common(loss: Loss, feed: Feed, recipe: Recipe) -> str | None:
    """What of the first steps is computed once for several rows, as a line; None if little is, or
    what is computed is not known yet.
    """
    once = apart = 0
    if OBJECTIVES[recipe.objective].draws:
        return None
    for examples in islice(feed.after(0), min(LOOKED_AT, feed.foreseen)):
        for part in loss.micro_batches(examples, recipe.accumulate, recipe.max_length):
            once += loss.computed(part)
            apart += sum(loss.computed([example]) for example in part)
    if once > 0.99 * apart:
        return None
    return f"packing: {1 - once / apart:.0%} of the tokens begin as another row's: computed once"


def check_sites(run: RunDirectory, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Raise LorafoldError if the targets of a run mean other modules than when it began: an earlier
    version may not have found all that can be adapted.

    Args:
        adapter: The run's, as its targets mean it now.
        tensors: Those of the adapter in the run's last checkpoint, of any shapes.
    """
    own, began = adapter.state_dict().keys(), tensors.keys()
    sides = {"now adapts": own - began, "no longer adapts": began - own}
    changes = []
    for what, keys in sides.items():
        if sites := sorted({key.rpartition(".")[0] for key in keys}):
            more = f" and {len(sites) - 1} more" * (len(sites) > 1)
            changes.append(f"{what} {sites[0]}{more}")
    if changes:
        raise LorafoldError(
            f"{run.path}: the run to resume adapted other modules when it began: with the same"
            f" targets this lorafold {' and '.join(changes)}. Use the lorafold that began it, or"
            " start again with --overwrite"
        )


def free_on_resume(recipe: Recipe) -> set[str]:
    """The fields that a resumed run may change."""
    return FREE_ON_RESUME - (WHEN_MEASURED if recipe.stops else set())


def depends_on(request: Request, objective: Objective) -> dict[str, Any]:
    """What the result of a run depends on besides its recipe, model, adapters and training rows:
    held-out rows, the file of a chat template, and what the objective names.
    """
    found: dict[str, Any] = {HELD_OUT: held_out_of(request), **objective.identity}
    template = request.recipe.chat_template
    if template is not None and Path(template).is_file():
        found["chat_template"] = sha256(Path(template).read_bytes()).hexdigest()
    return found


def held_out_of(request: Request) -> str:
    """The digest of the held-out rows that were given; empty without any."""
    return Rows.of(request.eval_rows).sha256 if request.eval_rows else ""


def identity_of(setup: Setup, adapter: Adapter) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was stopped, among it the version of
    lorafold.

    Args:
        adapter: Knows the digests of the adapters that it lies over.
    """
    request = setup.request
    recipe = request.recipe.model_dump(mode="json")
    free = free_on_resume(request.recipe)
    identity: dict[str, Any] = {k: v for k, v in recipe.items() if k not in free}
    identity |= {
        "lorafold": version("lorafold"),
        "model": request.base.name,
        "data": request.data.identity,
        "init_adapter": str(request.init_adapter or ""),
        FILES: setup.files,
        HELD_OUT: held_out_of(request),
    }
    if request.over:
        identity["over"] = [origin.sha256 for origin in adapter.over]
    if request.recipe.chat_template is not None or request.recipe.template_kwargs:
        # the template itself: the file that the recipe names may have changed
        template: Any = setup.tokenizer.chat_template
        named = template if isinstance(template, dict) else {"": str(template)}
        plain = {name: without_note(text) for name, text in named.items()}
        identity["chat_template"] = str(plain.get("", plain))
    identity |= setup.objective.identity
    if setup.day:
        identity["day"] = setup.day
    return identity


def sample_losses(
    loss: Loss, feed: Feed, recipe: Recipe, n: int, rows: int | None = None
) -> Iterator[Tensor]:
    """Mean losses of n batches, each a scalar in nats, drawn as training draws them but with a seed
    of their own.

    Args:
        loss: Put in training mode.
        feed: The examples to draw from.
        recipe: Gives the batch size and the seed.
        n: The number of losses.
        rows: Examples in each loss; None takes the recipe's batch.

    Raises LorafoldError for an objective that draws what it learns from.
    """
    if OBJECTIVES[recipe.objective].draws:
        raise LorafoldError(
            f"method {recipe.method}: it asks for losses of rows before the first step, where the"
            f" objective {recipe.objective} has none, expected a spec that says so (asks_losses)"
        )
    loss.train()
    for chosen in feed.drawn(n, rows or recipe.batch, recipe.seed + 1):
        inputs = loss.collate(chosen, loss.device) | loss.of_step(chosen)
        yield loss(**inputs) / max(1, sum(map(loss.count, chosen)))
