"""How a run starts: its method prepares a fresh adapter, or a checkpoint restores the tensors, the
optimizer and the random state of a run that was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Any

from rich.console import Console
from torch import Tensor

from lorafold.adapter import Adapter
from lorafold.core.delta import put
from lorafold.data.batches import BatchFeed
from lorafold.data.control_tokens import NOTE
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.objective import Data, OnPolicy
from lorafold.recipe.recipe import FEW, STEPS, Recipe
from lorafold.rewards.judging import REWARDS, adapter_in
from lorafold.runtime.processes import Processes
from lorafold.training.checkpoint import FILES, Progress, RunDirectory
from lorafold.training.loop import Plan
from lorafold.training.request import FREE_ON_RESUME, WHEN_MEASURED, depends_on
from lorafold.training.setup import Setup
from lorafold.training_step.adamw import described, make_optimizer, pick
from lorafold.training_step.losses import Loss
from lorafold.training_step.optim import (
    param_groups,
    parameters,
    rates,
    restore_optimizer,
    restore_rng,
    sum_in_fp32,
)
from lorafold.training_step.sharding import Sharded

LOOKED_AT = 8  # steps, for what their rows have in common


def prepare(
    setup: Setup,
    adapter: Adapter,
    loss: Loss,
    feed: BatchFeed,
    held_out: Data | None,
    console: Console,
) -> tuple[Plan, Progress]:
    """The plan of the steps, and how far they have come: a fresh run or a resumed one."""
    request, layout, where = setup.request, setup.layout, setup.request.base.where
    processes, objective = layout.processes, setup.objective
    recipe, run, spec = request.recipe, RunDirectory(request.out), adapter.spec
    progress, state = begin(setup, adapter, loss, feed, console)
    lr_b = spec.lr_b and spec.lr_b * (loss.pace_up or loss.pace)
    lr = recipe.lr or spec.lr * loss.pace
    whole = None if recipe.lr or spec.lr_whole is None else spec.lr_whole * loss.pace
    groups = param_groups(
        adapter.parts(), lr, recipe.lr_b or lr_b or lr, not recipe.weight_decay, whole
    )
    sum_in_fp32(adapter.model)
    if isinstance(layout, Sharded):
        layout.share_out(parameters(groups))
    parts = processes.count if layout.divides else 1
    chosen = pick(recipe.optimizer, progress.optimizer, groups, where, processes, parts)
    progress.optimizer = chosen.name
    for line in (described(chosen, groups, recipe.seed, parts), rates(groups, lr)):
        console.print(line, highlight=False, soft_wrap=True)
    optimizer = make_optimizer(chosen.name, groups, recipe)
    if state:
        own = {k: v for k, v in state.items() if not k.startswith("rng.")}
        with layout.apart():
            restore_optimizer(optimizer, own, layout.updates)
        restore_rng(state)
    if state is not None:
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
    guessing = objective.guessing(setup.findings.labels)
    return Plan(
        recipe, objective, adapter, loss, where, optimizer, feed, held_out, guessing, run, layout
    ), progress


def begin(
    setup: Setup, adapter: Adapter, loss: Loss, feed: BatchFeed, console: Console
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Load the last checkpoint of a run that is resumed into the adapter, or have the method
    prepare a fresh one. Returns how far the run is, and the tensors of its optimizer: none before
    the first checkpoint, of any shape after it, None for a fresh run.
    """
    request, layout, spec = setup.request, setup.layout, adapter.spec
    run, identity = RunDirectory(request.out), identity_of(setup, adapter)
    resumes = request.resume and run.path.exists()
    if resumes:
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
            with layout.apart():
                adapter.load_state_dict(tensors, layout.owns)
            return progress, state
    elif request.resume:
        told = f"{run.path}: no run to resume, this one starts from the beginning"
        console.print(told, soft_wrap=True)
    if layout.processes.first and not resumes:
        run.start(identity)
    spec.prepare(adapter.own_deltas, partial(sample_losses, loss, feed, request.recipe))
    if layout.processes.count > 1:
        take_first(adapter, layout.processes)
    return Progress(), {} if resumes else None


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


def in_common(setup: Setup, loss: Loss, feed: BatchFeed) -> str | None:
    """What of the first steps is computed once for several rows, as a line; None if little is, or
    what is computed is not known yet.
    """
    once, apart, recipe = 0, 0, setup.request.recipe
    if isinstance(setup.objective, OnPolicy):
        return None
    for examples in islice(feed.after(0), min(LOOKED_AT, feed.foreseen)):
        apart += sum(loss.computed([example]) for example in examples)
        for part in loss.micro_batches(examples, recipe.accumulate, recipe.max_length):
            once += loss.computed([examples[i] for i in part])
    if once > 0.99 * apart:
        return None
    return f"packing: {1 - once / apart:.0%} of the tokens begin as another row's: computed once"


def identity_of(setup: Setup, adapter: Adapter) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was stopped, among it the version of
    lorafold.
    """
    request = setup.request
    recipe = request.recipe.model_dump(mode="json")
    free = FREE_ON_RESUME - WHEN_MEASURED if request.recipe.stops else FREE_ON_RESUME
    identity: dict[str, Any] = {k: v for k, v in recipe.items() if k not in free}
    identity |= {
        "lorafold": version("lorafold"),
        "model": request.base.name,
        "data": request.data.identity,
        "init_adapter": str(request.init_adapter or ""),
        FILES: setup.files,
        **depends_on(request, setup.objective),
    }
    if request.over:
        identity["over"] = [origin.sha256 for origin in adapter.over]
    if request.recipe.chat_template is not None or request.recipe.template_kwargs:
        # the template itself: the file that the recipe names may have changed
        template: Any = setup.tokenizer.chat_template
        named = template if isinstance(template, dict) else {"": str(template)}
        plain = {name: NOTE.sub("", text) for name, text in named.items()}
        identity["chat_template"] = str(plain.get("", plain))
    if setup.day:
        identity["day"] = setup.day
    return identity


def sample_losses(
    loss: Loss, feed: BatchFeed, recipe: Recipe, n: int, rows: int | None = None
) -> Iterator[Tensor]:
    """Mean losses of n batches, each a scalar in nats, drawn as training draws them but with a seed
    of their own.
    """
    if issubclass(OBJECTIVES[recipe.objective].kind, OnPolicy):
        raise LorafoldError(
            f"method {recipe.method}: it asks for losses of rows before the first step, where the"
            f" objective {recipe.objective} has none, expected a spec that says so (asks_losses)"
        )
    loss.train()
    for chosen in feed.drawn(n, rows or recipe.batch, recipe.seed + 1):
        inputs = loss.collate(chosen, loss.device)
        yield loss(**inputs, **loss.of_step(chosen)) / max(1, sum(map(loss.count, chosen)))
