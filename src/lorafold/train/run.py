"""One training run from names to an adapter on disk: model, data, recipe in; a directory in PEFT's
format out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from lorafold.adapter import Adapter, attach, load
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.evaluate import held_out_loss
from lorafold.io import peft
from lorafold.io.allocator import keep_freed_blocks
from lorafold.io.atomic import check_out
from lorafold.io.card import VOCABULARY, training_card
from lorafold.io.models import ModelSource, choose_device, choose_storage, resolve_model, weights_of
from lorafold.io.room import peak_bytes
from lorafold.io.tokenizer import Words, add_words, has_tokenizer, set_template, tokenizer_of
from lorafold.io.weights import Weights
from lorafold.memory.ahead import planned, settle
from lorafold.memory.shapes import configuration
from lorafold.methods import make_spec
from lorafold.methods.tokens import Tokens
from lorafold.train.activations import recompute
from lorafold.train.adamw import (
    check_available,
    check_rounding,
    described,
    free_everywhere,
    make_optimizer,
    pick,
)
from lorafold.train.base import settled_base
from lorafold.train.checkpoint import Progress, RunDirectory
from lorafold.train.data import batches, split
from lorafold.train.display import Display
from lorafold.train.fused import fused
from lorafold.train.loop import Job, fit
from lorafold.train.losses import Loss
from lorafold.train.objectives import OBJECTIVES, Data, Objective
from lorafold.train.optim import param_groups, restore_optimizer, restore_rng
from lorafold.train.recipe import Recipe
from lorafold.train.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Fields that an adapter to start from brings along.
_OF_THE_ADAPTER = {
    "method",
    "rank",
    "alpha",
    "dropout",
    "options",
    "targets",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
    "new_tokens",
}
# Fields that change what is watched or kept and not what is learned: a resumed run may differ in
# them.
_FREE_ON_RESUME = {"save_every", "eval_every", "keep", "trackers"}


@dataclass(frozen=True)
class Request:
    """What to train, on what, and where to put it.

    `out` must not exist unless overwrite or resume is on.
    """

    model: str
    out: Path
    recipe: Recipe
    rows: Sequence[Row]
    source: str  # where the rows came from, for the record
    eval_rows: Sequence[Row] | None = None
    init_adapter: Path | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Losses are means over labelled tokens (texts, if classified), `train_loss` over ten steps; bytes
    are bytes.
    """

    train_loss: float
    eval_loss: float | None
    tokens_per_second: float
    peak_bytes: int
    trainable_parameters: int
    steps: int
    seconds: float
    adapter: str
    losses: list[float]


def digest(rows: Sequence[Row]) -> str:
    """sha256 over the rows as JSON: the same data gives the same digest whatever file format it
    came in.
    """
    h = hashlib.sha256()
    for row in rows:
        h.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return h.hexdigest()


def objective_of(request: Request) -> tuple[ModelSource, Objective]:
    """Where the model lies, and the objective of the run on it."""
    source = resolve_model(request.model, request.revision)
    adapters = [request.init_adapter] if request.init_adapter else []
    return source, OBJECTIVES[request.recipe.objective](request.rows, source, adapters)


def tokenizer_for(
    request: Request, source: ModelSource, objective: Objective, console: Console
) -> tuple[PreTrainedTokenizerBase, Words]:
    """The tokenizer with the recipe's chat template and new tokens, and what is to be known of
    these. What was done is printed.
    """
    adapters = [request.init_adapter] if request.init_adapter else []
    tokenizer = tokenizer_of(source, adapters, request.trust_remote_code)
    if request.recipe.chat_template is not None:
        set_template(tokenizer, request.recipe.chat_template)
    words = add_words(tokenizer, request.recipe.new_tokens)
    for notice in (str(words), objective.set_up(tokenizer)):
        if notice:
            console.print(notice, highlight=False, markup=False)
    return tokenizer, words


def tokenized(
    request: Request, tokenizer: PreTrainedTokenizerBase, objective: Objective, console: Console
) -> tuple[Data, Data | None]:
    """The training rows and the held-out rows, with what there is to say about them."""
    rows, held_out = list(request.rows), request.eval_rows
    if held_out is None and request.recipe.eval_fraction:
        rows, held_out = split(rows, request.recipe.eval_fraction, request.recipe.seed)
    train = objective.encode(rows, tokenizer, request.recipe.max_length)
    console.print(f"data: {train.report}", highlight=False)
    if not held_out:
        return train, None
    evaluation = objective.encode(held_out, tokenizer, request.recipe.max_length)
    console.print(f"held out: {evaluation.report}", highlight=False)
    return train, evaluation


def show(request: Request, console: Console, rows: int = 3) -> None:
    """Print the first rows as the model will see them, with the tokens that count in the loss
    marked.
    """
    source, objective = objective_of(request)
    tokenizer, _ = tokenizer_for(request, source, objective, console)
    train, _ = tokenized(request, tokenizer, objective, console)
    for example in train.examples[:rows]:
        console.rule()
        console.print(objective.preview(example, tokenizer))


def train(request: Request, console: Console) -> Trained:
    """Train one adapter and write it to `request.out`.

    Raises LorafoldError for anything wrong with the request, and Interrupted (a checkpoint is
    written) after SIGINT or SIGTERM.
    """
    for path in (request.out, best_path(request.out)):
        check_out(path, request.overwrite or request.resume)
    RunDirectory(request.out).check_free(request.overwrite or request.resume)
    check_available(request.recipe.optimizer)
    spec = make_spec(request.recipe.method, **request.recipe.method_options())
    if request.init_adapter and (
        fixed := sorted(_OF_THE_ADAPTER & request.recipe.model_fields_set)
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
    )
    config = configuration(str(source.path), trust_remote_code=request.trust_remote_code)
    checkpointing = settle(
        config, plan, recipe.gradient_checkpointing, free_everywhere(accelerator), console
    )
    model = objective.load(
        source, tokenizer, storage, device, recipe.seed, request.trust_remote_code
    )
    keep_freed_blocks()
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
        run.check(identity)
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
    device = next(loss.parameters()).device
    for drawn in batches(len(data.examples), rows or recipe.batch, n, recipe.seed + 1):
        chosen = [data.examples[i] for i in drawn]
        yield loss(**loss.collate(chosen, device)) / max(1, sum(map(loss.count, chosen)))


def finish(
    request: Request,
    job: Job,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase | None,
    about: Mapping[str, Any],
    base: Weights | None,
) -> Trained:
    """Write the adapter, with `about` in its record and the `tokenizer` beside it if it has its
    own, and the best one to `<out>.best` if that was an earlier step; drop the checkpoints. `base`
    has the base's own weights where the model does not.
    """
    tail = progress.losses[-10:]
    result = Trained(
        train_loss=sum(tail) / len(tail),
        eval_loss=progress.evals.get(progress.step),
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_bytes=peak_bytes(job.accelerator.device),
        trainable_parameters=sum(p.numel() for p in job.adapter.parameters()),
        steps=progress.step,
        seconds=progress.seconds,
        adapter=str(request.out),
        losses=progress.losses,
    )
    if not job.accelerator.is_main_process:
        return result
    record = {
        "recipe": request.recipe.model_dump(mode="json"),
        "losses": progress.losses,
        "evals": progress.evals,
        "data": {
            "source": request.source,
            "rows": len(request.rows),
            "sha256": digest(request.rows),
        },
        **about,
    }
    if (size := job.adapter.vocabulary) is not None:
        record |= {VOCABULARY: size}
    card = training_card(request.model, record, asdict(result), whole=job.adapter.spec.trains_base)

    def write(path: Path, record: dict[str, Any]) -> None:
        overwrite = request.overwrite or request.resume
        job.adapter.save(
            path, overwrite=overwrite, card=card, record=record, tokenizer=tokenizer, base=base
        )

    write(request.out, record)
    if progress.best not in (None, progress.step):
        _, tensors, _ = job.run.load(job.run.checkpoints()[progress.best])
        job.adapter.load_state_dict(tensors)
        write(best_path(request.out), record | {"step": progress.best})
    job.run.remove()
    return result


def best_path(out: Path) -> Path:
    """Where the adapter of the step with the lowest held-out loss goes, if that is not the last
    step.
    """
    return out.with_name(out.name + ".best")
