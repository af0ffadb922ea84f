"""A training run: from a base model, rows and a recipe to an adapter directory in PEFT's format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from lorafold.adapter import Adapter
from lorafold.core.delta import set_tensor
from lorafold.data.batches import BatchFeed
from lorafold.data.control_tokens import EXCEPTIONS
from lorafold.errors import LorafoldError
from lorafold.files.paths import check_name
from lorafold.files.terminal import format_bytes, print_lines
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.objective import Data, OnPolicy
from lorafold.recipe.recipe import STEPS, Recipe
from lorafold.rewards.reward import ADAPTER, REWARDS, WEIGHTED
from lorafold.runtime.memory import KEEP_FREED, RETURN_FREED, malloc_policy
from lorafold.runtime.processes import SINGLE_PROCESS, Processes
from lorafold.training.checkpoint import FILES, RNG, Progress, RunDirectory, restore_rng
from lorafold.training.finish import Trained, finish, finished_result
from lorafold.training.inputs import RunRequest, fixed_on_resume, input_identity
from lorafold.training.loop import Plan, fit
from lorafold.training.progress_display import Display, start_trackers
from lorafold.training.setup import Setup, check_paths_disjoint, load_adapted_model, set_up
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.losses import Loss
from lorafold.training_step.optimizers import choose_optimizer, make_optimizer, optimizer_line
from lorafold.training_step.param_groups import (
    param_groups,
    parameters,
    rates,
    restore_optimizer,
    sum_in_fp32,
)
from lorafold.training_step.sharded_data_parallel import Sharded

NUM_PREFIX_STEPS = 8  # steps whose rows are searched for shared prefixes


def train(request: RunRequest, console: Console, processes: Processes = SINGLE_PROCESS) -> Trained:
    """Trains one adapter and writes it to `request.out`. Every process has the same request.
    Resuming a finished run changes nothing. After SIGINT or SIGTERM, the run writes a checkpoint
    and raises Interrupted.
    """
    check_name(request.out)
    if (request.over or request.init_adapter) and not request.resume:
        check_paths_disjoint(request)  # for a resumed run, after it is known not to be finished
    with RunDirectory(request.out).locked() if processes.first else nullcontext():
        # all processes take part, because one of them may have other options
        if request.resume or processes.count > 1:
            result = processes.once(partial(finished_result, request, console))
            if result is not None:
                return result
        return _train(set_up(request, console, processes), console)


def _train(setup: Setup, console: Console) -> Trained:
    request, recipe, objective = setup.request, setup.request.recipe, setup.objective
    layout, tokenizer, base = setup.layout, setup.tokenizer, request.base
    # identities of the model without the trained adapter: its files, dtype and device
    identities = [of["sha256"] for name, of in setup.files.items() if name != "init_adapter"]
    identities += [base.loaded_as.name, str(base.loaded_as.dtype), base.where.type]

    with layout.gathering():
        model, adapter, base_weights = load_adapted_model(setup, console)

    if isinstance(layout, Sharded):
        sharding: Any = sharded_model(layout, model, console)
    else:
        sharding, notice = nullcontext(), "one process has all weights; start several to shard them"
        print_lines(console, f"strategy fsdp: {notice}" * (recipe.strategy == "fsdp"))
    with malloc_policy(KEEP_FREED), sharding:
        with (
            # first, because a policy's sampler copies the modules before they are fused
            objective.loss(model, tokenizer, recipe.packing, console) as loss,
            fused(model) as fast_path,
        ):
            print_lines(console, fast_path, detail=True)
            loss.to(base.where)
            with layout.gathering():
                # some objectives add the untrained model's log-probabilities to the rows
                feed, held_out = objective.refer(
                    loss, setup.feed, setup.held_out, identities, console, layout
                )
                print_lines(console, shared_prefix_line(setup, loss, feed), detail=True)
                plan, progress = make_plan(setup, adapter, loss, feed, held_out, console)

            # outside the run directory, because that is removed at the end
            logs = request.out.with_name(request.out.name + ".logs")
            is_tracked = recipe.trackers and layout.processes.first
            trackers = start_trackers(recipe, logs) if is_tracked else []
            with Display(console, feed.steps, progress.step, trackers) as display:
                fit(plan, progress, display)

        print_lines(console, feed.summary, adapter.spec.report(adapter.own_deltas))
        return finish(setup, plan, progress, base_weights)


@contextmanager
def sharded_model(layout: Sharded, model: nn.Module, console: Console) -> Iterator[None]:
    """Context in which the model is sharded; prints the sizes of the shards."""
    # the memory of temporarily gathered tensors must be returned to the system
    with malloc_policy(RETURN_FREED), layout.sharding(model):
        total, own, largest = map(format_bytes, layout.sizes())
        print_lines(
            console,
            f"strategy fsdp: rank 0 of {layout.processes.count} keeps {own} of {total} of"
            f" weights, and gathers at most {largest} at a time",
        )
        yield


def make_plan(
    setup: Setup,
    adapter: Adapter,
    loss: Loss,
    feed: BatchFeed,
    held_out: Data | None,
    console: Console,
) -> tuple[Plan, Progress]:
    request, layout, spec = setup.request, setup.layout, adapter.spec
    recipe, where, processes = request.recipe, request.base.where, layout.processes
    progress, state = start_or_resume(setup, adapter, loss, feed, console)
    lr_b = spec.lr_b and spec.lr_b * (loss.pace_up or loss.pace)
    lr = recipe.lr or spec.lr * loss.pace
    lr_whole = None if recipe.lr or spec.lr_whole is None else spec.lr_whole * loss.pace
    groups = param_groups(
        adapter.parts(), lr, recipe.lr_b or lr_b or lr, not recipe.weight_decay, lr_whole
    )
    sum_in_fp32(adapter.model)
    if isinstance(layout, Sharded):
        layout.assign_owners(parameters(groups))
    parts = processes.count if layout.is_sharded else 1
    choice = choose_optimizer(recipe.optimizer, progress.optimizer, groups, where, processes, parts)
    progress.optimizer = choice.name
    line = optimizer_line(choice, groups, recipe.seed, parts)
    print_lines(console, line, rates(groups, lr), detail=True)
    optimizer = make_optimizer(choice.name, groups, recipe)
    if state:
        with layout.uncoordinated():
            tensors = {k: v for k, v in state.items() if not k.startswith(RNG)}
            restore_optimizer(optimizer, tensors, layout.updates)
        restore_rng(state)
    if state is not None:
        print_lines(console, f"resuming after step {progress.step} of {feed.steps}")
    if recipe.stops and held_out is None and feed.steps == STEPS:
        remedy = "without early stopping, which needs held-out rows (--eval-fraction 0.1)"
        print_lines(console, f"epochs auto: {feed.steps} steps, {remedy}", detail=True)
    plan = Plan(
        recipe, setup.objective, adapter, loss, where, optimizer, feed, held_out,
        setup.objective.guessing(setup.findings.labels), RunDirectory(request.out), layout,
    )  # fmt: skip
    return plan, progress


def start_or_resume(
    setup: Setup, adapter: Adapter, loss: Loss, feed: BatchFeed, console: Console
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Loads the last checkpoint of a resumed run, or lets the method prepare a new adapter. Returns
    the progress and the optimizer's tensors (any shapes): {} if the resumed run has no checkpoint
    yet, None for a new run.
    """
    request, layout, spec = setup.request, setup.layout, adapter.spec
    run, identity = RunDirectory(request.out), run_identity(setup, adapter)
    resumes = request.resume and run.path.exists()
    if resumes:
        recorded, rewards = run.recorded(REWARDS) or {}, identity.get(REWARDS, {})
        changed = [name for name, digest in recorded.items() if rewards.get(name) != digest]
        is_adapter = any(WEIGHTED.findall(name)[0][1].startswith(ADAPTER) for name in changed)
        if changed and recorded.keys() == rewards.keys() and not is_adapter:
            identity[REWARDS] = recorded  # for example, a bug in the reward was fixed
            notice = f"reward {', '.join(changed)}: changed since the run began"
            print_lines(console, f"{notice}; the next steps use the new version")
        run.check(identity)
        if checkpoints := run.checkpoints():
            progress, tensors, state = run.load(checkpoints[max(checkpoints)])
            loss.counts |= progress.counts
            with layout.uncoordinated():
                adapter.load_state_dict(tensors, layout.owns)
            return progress, state
    elif request.resume:
        print_lines(console, f"{run.path}: no run to resume, so this run starts from the beginning")
    if layout.processes.first and not resumes:
        run.start(identity)
    spec.prepare(adapter.own_deltas, partial(sample_losses, loss, feed, request.recipe))
    if layout.processes.count > 1:
        copy_from_rank0(adapter, layout.processes)
    return Progress(), {} if resumes else None


def copy_from_rank0(adapter: Adapter, processes: Processes) -> None:
    """Copies rank 0's prepared adapter to all processes, because rounding differences can make a
    method choose other entries.
    """
    states = {path: delta.state_dict() for path, delta in adapter.deltas.items()}
    shapes = {path: {name: t.shape for name, t in of.items()} for path, of in states.items()}
    for path, first in processes.once(lambda: shapes).items():
        for name, shape in first.items():
            if shape != shapes[path][name]:
                set_tensor(adapter.deltas[path], name, states[path][name].new_empty(shape))
    processes.same([p.detach() for p in adapter.tensors()])


def shared_prefix_line(setup: Setup, loss: Loss, feed: BatchFeed) -> str | None:
    """A log line about shared prefixes in the first steps; None if there are few, or if completions
    are sampled.
    """
    computed, each, recipe = 0, 0, setup.request.recipe
    if isinstance(setup.objective, OnPolicy):
        return None
    for examples in islice(feed.after(0), min(NUM_PREFIX_STEPS, feed.num_previewed)):
        each += sum(loss.computed([example]) for example in examples)
        for indices in loss.micro_batches(examples, recipe.accumulate, recipe.max_length):
            computed += loss.computed([examples[i] for i in indices])
    if computed > 0.99 * each:
        return None
    return f"packing: {1 - computed / each:.0%} of the tokens repeat a prefix that is computed once"


def run_identity(setup: Setup, adapter: Adapter) -> dict[str, Any]:
    """The settings and inputs that a resumed run must share with the stopped one."""
    request = setup.request
    identity = fixed_on_resume(request.recipe, request.recipe.model_dump(mode="json"))
    identity |= {
        "lorafold": version("lorafold"),
        "model": request.base.name,
        "data": request.data.identity,
        "init_adapter": str(request.init_adapter or ""),
        FILES: setup.files,
        **input_identity(request, setup.objective),
    }
    if request.over:
        identity["over"] = [origin.sha256 for origin in adapter.over]
    if request.recipe.chat_template is not None or request.recipe.template_kwargs:
        # the template's text, because the file that the recipe names may have changed
        template = setup.tokenizer.chat_template
        templates = template if isinstance(template, dict) else {"": str(template)}
        plain = {name: EXCEPTIONS.sub("", text) for name, text in templates.items()}
        identity["chat_template"] = str(plain.get("", plain))
    if setup.day:
        identity["day"] = setup.day
    return identity


def sample_losses(
    loss: Loss, feed: BatchFeed, recipe: Recipe, n: int, rows: int | None = None
) -> Iterator[Tensor]:
    """The mean losses of n batches, each a scalar in nats, sampled with another seed than in
    training.
    """
    if issubclass(OBJECTIVES[recipe.objective].kind, OnPolicy):
        raise LorafoldError(
            f"method {recipe.method}: prepare uses losses of rows, which objective"
            f" {recipe.objective} lacks; use another objective, and set asks_losses in the spec"
        )
    loss.train()
    for examples in feed.random_batches(n, rows or recipe.batch, recipe.seed + 1):
        inputs = loss.collate(examples, loss.device)
        yield loss(**inputs, **loss.of_step(examples)) / max(1, sum(map(loss.count, examples)))
