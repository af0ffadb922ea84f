"""One training run from names to an adapter on disk: model, data, recipe in; a directory in PEFT's
format out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from lorafold.adapter import Adapter, attach, load
from lorafold.core.spec import Spec
from lorafold.data.batches import batches
from lorafold.errors import LorafoldError
from lorafold.evaluation import held_out_loss
from lorafold.files.atomic import check_out
from lorafold.machine.allocator import freed_blocks_kept
from lorafold.machine.devices import choose_device
from lorafold.memory.before_run import planned, settle
from lorafold.methods.parts.token_rows import Tokens
from lorafold.models.configuration import configuration
from lorafold.models.storage import choose_storage, weights_of
from lorafold.models.tokenizer import Words, has_tokenizer
from lorafold.peft import directory as peft
from lorafold.step.activations import recompute
from lorafold.step.adamw import (
    check_available,
    check_rounding,
    described,
    free_everywhere,
    make_optimizer,
    pick,
)
from lorafold.step.fitting import settled_base, spec_of, without
from lorafold.step.fused import fused
from lorafold.step.losses import Loss
from lorafold.step.optim import param_groups, restore_optimizer, restore_rng
from lorafold.step.recipe import OF_ADAPTER, Recipe
from lorafold.training.checkpoint import Progress, RunDirectory
from lorafold.training.display import Display
from lorafold.training.finish import Trained, best_path, finish
from lorafold.training.loop import Job, fit
from lorafold.training.objectives import Data, Objective
from lorafold.training.request import Request, digest, objective_of, tokenized, tokenizer_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Fields that change what is watched or kept and not what is learned: a resumed run may differ in
# them.
_FREE_ON_RESUME = {"save_every", "eval_every", "keep", "trackers"}


def train(request: Request, console: Console) -> Trained:
    """Train one adapter and write it to `request.out`.

    Raises LorafoldError for anything wrong with the request, and Interrupted (a checkpoint is
    written) after SIGINT or SIGTERM.
    """
    for path in (request.out, best_path(request.out)):
        check_out(path, request.overwrite or request.resume)
    RunDirectory(request.out).check_free(request.overwrite or request.resume)
    check_available(request.recipe.optimizer)
    spec = spec_of(request.recipe)
    if notice := without(request.recipe):
        console.print(notice, highlight=False)
    if request.init_adapter and (
        fixed := sorted(OF_ADAPTER & request.recipe.model_fields_set)
    ):
        raise LorafoldError(
            f"{', '.join(fixed)}: these come with the adapter that --init-adapter names, and can't"
            " be set beside it"
        )
    source, objective = objective_of(request)
    recipe = request.recipe.model_copy(
        update={"base": settled_base(request.recipe, spec, source, request.init_adapter)}
    )
    request = replace(request, recipe=recipe)
    device = choose_device(request.device)
    storage = choose_storage(recipe.base, device)
    if spec.trains_base:
        check_rounding(recipe.optimizer, [storage.dtype])
    tokenizer, words = tokenizer_for(request, source, objective, console)
    data, held_out = tokenized(request, tokenizer, objective, console)
    console.print(f"base: {storage.why}", highlight=False)
    # trackers' own; they outlive the checkpoints
    logs = str(request.out.with_name(request.out.name + ".logs"))
    accelerator = Accelerator(
        cpu=device.type == "cpu", log_with=list(recipe.trackers) or None, project_dir=logs
    )
    if recipe.batch % accelerator.num_processes:
        raise LorafoldError(
            f"batch {recipe.batch} can't be split over {accelerator.num_processes} processes"
        )
    stored = peft.read(request.init_adapter) if request.init_adapter else None
    beside = stored.beside if stored else partial(extras, recipe, spec, objective, words)
    laid = stored.spec if stored else spec
    plan = planned(
        recipe,
        laid,
        storage,
        data.examples,
        beside,
        len(objective.classes),
        accelerator.num_processes,
        device,
    )
    config = configuration(str(source.path), trust_remote_code=request.trust_remote_code)
    checkpointing = settle(
        config, plan, recipe.gradient_checkpointing, free_everywhere(accelerator), console
    )
    model = objective.load(
        source, tokenizer, storage, device, recipe.seed, request.trust_remote_code
    )
    torch.manual_seed(recipe.seed)
    weights = weights_of(source, storage)
    adapter = (
        load(model, request.init_adapter, trainable=True, base=weights)
        if request.init_adapter
        else attach(model, spec, recipe.targets, base=weights, **beside(model))
    )
    console.print(repr(adapter), highlight=False, markup=False)
    if checkpointing:
        recompute(model)
    with ExitStack() as stack:
        stack.enter_context(freed_blocks_kept())
        console.print(str(stack.enter_context(fused(model))), highlight=False)
        loss = stack.enter_context(objective.loss(model, tokenizer, recipe.packing, console))
        job, progress = prepare(
            request, adapter, loss, accelerator, data, held_out, tokenizer, console
        )
        with Display(console, job.steps, progress.step) as display:
            try:
                fit(job, progress, display)
            finally:
                accelerator.end_training()
    if report := adapter.spec.report(adapter.own_deltas):
        console.print(report, highlight=False)
    inherited = request.init_adapter is not None and has_tokenizer(request.init_adapter)
    own = (
        tokenizer
        if words.ids or recipe.chat_template or inherited or adapter.spec.trains_base
        else None
    )
    return finish(
        request,
        job,
        progress,
        own,
        objective.record() | ({"new_tokens": words.ids} if words.ids else {}),
        weights,
    )


def extras(
    recipe: Recipe, spec: Spec, objective: Objective, words: Words, model: PreTrainedModel
) -> dict[str, Any]:
    """What is trained on this model beside the method: biases, whole modules, rows of tokens."""
    saved = (*recipe.modules_to_save, *objective.modules_to_save(model, spec, recipe.targets))
    tokens = Tokens(tuple(words.ids.values()), frozenset(words.ids[word] for word in words.new))
    return {"bias": recipe.bias, "modules_to_save": saved, "tokens": tokens}


def prepare(
    request: Request,
    adapter: Adapter,
    loss: Loss,
    accelerator: Accelerator,
    data: Data,
    held_out: Data | None,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> tuple[Job, Progress]:
    """The job, and how far it is: a fresh run is prepared by its method, one that is resumed takes
    up the tensors it had.
    """
    recipe, run = request.recipe, RunDirectory(request.out)
    identity: dict[str, Any] = {
        k: v for k, v in recipe.model_dump(mode="json").items() if k not in _FREE_ON_RESUME
    }
    identity |= {
        "model": request.model,
        "data": digest(request.rows),
        "init_adapter": str(request.init_adapter or ""),
    }
    if recipe.chat_template is not None:
        identity["chat_template"] = str(tokenizer.chat_template)  # what it says, not where it lies
    progress, state = Progress(), None
    loss.to(accelerator.device)
    if request.resume:
        run.check(identity, Recipe().model_dump(mode="json"))
        if checkpoints := run.checkpoints():
            progress, tensors, state = run.load(checkpoints[max(checkpoints)])
            adapter.load_state_dict(tensors)
    else:
        run.start(identity)
        adapter.spec.prepare(adapter.own_deltas, partial(sample_losses, loss, data, recipe))
    lr = recipe.lr or adapter.spec.lr
    groups = param_groups(adapter.parts(), lr, recipe.lr_b or adapter.spec.lr_b or lr)
    chosen = pick(recipe.optimizer, progress.optimizer, groups, accelerator)
    progress.optimizer = chosen.name
    console.print(described(chosen, groups, recipe.seed), highlight=False, soft_wrap=True)
    wrapped, optimizer = accelerator.prepare(loss, make_optimizer(chosen.name, groups, recipe))
    if state is not None:
        restore_optimizer(optimizer, {k: v for k, v in state.items() if not k.startswith("rng.")})
        restore_rng(state)
    accelerator.init_trackers(
        "lorafold", config={k: str(v) for k, v in recipe.model_dump().items()}
    )
    if request.resume:
        console.print(
            f"resuming after step {progress.step} of {recipe.total_steps(len(data.examples))}",
            highlight=False,
        )
    return Job(
        adapter, loss, wrapped, optimizer, accelerator, data.examples,
        None if held_out is None else lambda: held_out_loss(loss, held_out.examples),
        recipe, run, recipe.total_steps(len(data.examples)),
    ), progress  # fmt: skip


def sample_losses(
    loss: Loss, data: Data, recipe: Recipe, n: int, rows: int | None = None
) -> Iterator[Tensor]:
    """n mean losses, each of `rows` rows or else a batch, drawn as training draws them, with a seed
    of their own.
    """
    loss.train()
    for drawn in batches(len(data.examples), rows or recipe.batch, n, recipe.seed + 1):
        chosen = [data.examples[i] for i in drawn]
        yield loss(**loss.collate(chosen, loss.device)) / max(1, sum(map(loss.count, chosen)))


