"""The setup of a run: checks of its request (before anything is loaded), choices, and the model."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lorafold.adapter import Adapter, attach, load
from lorafold.adapter.coverage import encoder_targets_note, text_only_note, unreached
from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import Adapted, Origin
from lorafold.core.matrices import module_at
from lorafold.core.spec import Spec
from lorafold.data.batches import BatchFeed
from lorafold.data.branches import Branched
from lorafold.data.checks import Findings
from lorafold.data.templates import day_of, on_day
from lorafold.errors import LorafoldError, listed, shortened
from lorafold.files.atomic import check_out
from lorafold.files.terminal import print_lines
from lorafold.identity import COMPUTED_WITH, TRAINING, of_adapter, of_code
from lorafold.memory.preflight import choose_checkpointing, largest_batch
from lorafold.memory.trace import Setting
from lorafold.methods.parts.trainable_tokens import TrainableTokens
from lorafold.models.positions import positions_of
from lorafold.models.tokenizer import AddedTokens
from lorafold.models.weights import Weights
from lorafold.objectives.objective import Data, Objective, OnPolicy
from lorafold.peft.adapter_directory import SavedAdapter, open_all
from lorafold.peft.provenance import mismatch_message, same_adapters
from lorafold.recipe.fields import OF_ADAPTER
from lorafold.recipe.fitting import left_out, settled_base, spec_of, without
from lorafold.resolve.base import check_language_model
from lorafold.runtime.memory import free_bytes
from lorafold.runtime.processes import ALONE, Processes
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.request import (
    RunRequest,
    depends_on,
    objective_of,
    tokenized,
    tokenizer_for,
    with_length,
)
from lorafold.training_step.adamw import bitsandbytes_optimizers, check_rounding
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.gradient_checkpointing import recompute
from lorafold.training_step.sharding import Sharded
from lorafold.training_step.shared_prefixes import may_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 40  # characters of a value


@dataclass(frozen=True)
class Setup:
    """The choices of a run that need no model; `request` has the base's chosen dtype or
    quantization.
    """

    request: RunRequest
    spec: Spec
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    words: AddedTokens
    files: dict[str, dict[str, str]]
    saved: list[SavedAdapter]  # the adapters to load, lowest first; none once they are loaded
    own_tokenizer: bool  # whether the run's tokenizer differs from the base's
    feed: BatchFeed
    held_out: Data | None
    findings: Findings
    layout: Replicated  # the placement of tensors among the processes
    day: str = ""  # the date in the chat template; empty if it has none


def check_request(request: RunRequest, console: Console, processes: Processes) -> Spec:
    """Check the request, print the fields that the method ignores, and return the method's spec."""
    if request.over or request.init_adapter:
        check_places(request)
    run, replaces = RunDirectory(request.out), request.overwrite or request.resume
    count = processes.count
    if processes.first:  # only it writes
        for path in (run.out, run.best):
            check_out(path, replaces)
        if run.checkpoints() and not replaces:
            raise LorafoldError(
                f"{run.path} contains a stopped run: pass --resume to continue it, or --overwrite"
                " to start again"
            )
    if (batch := request.recipe.batch) % count:
        raise LorafoldError(
            f"batch {batch} can't be split over {count} processes; expected a multiple of {count}"
        )
    if request.recipe.optimizer not in ("auto", "adamw"):
        bitsandbytes_optimizers(request.recipe.optimizer)
    spec = spec_of(request.recipe)
    if left_out(request.recipe):
        print_lines(console, without(request.recipe))
    fixed = sorted(OF_ADAPTER & request.recipe.model_fields_set)
    if request.init_adapter and fixed:
        raise LorafoldError(
            f"{', '.join(fixed)}: the adapter of --init-adapter fixes these fields; remove them"
            " from the recipe"
        )
    if request.over and spec.trains_base:
        raise LorafoldError(
            f"--over: method {request.recipe.method} trains the base's own weights, so it can't"
            " train on top of adapters; merge them into the base first"
        )
    return spec


def check_places(request: RunRequest, besides: Iterable[tuple[str, Path]] = ()) -> None:
    """Raise if a path that the run writes is, contains or lies in one that it reads."""
    run = RunDirectory(request.out)
    read = [*(("--over", path) for path in request.over), *besides]
    if request.init_adapter:
        read.append(("--init-adapter", request.init_adapter))
    for option, path in read:
        adapter = path.resolve()
        for target in (w.resolve() for w in (run.out, run.best, run.path)):
            if target.is_relative_to(adapter) or adapter.is_relative_to(target):
                raise LorafoldError(
                    f"--out {request.out}: the run would write {target}, which overlaps with the"
                    f" input {option} {path}; choose a directory outside of it"
                )


def saved_adapters(request: RunRequest) -> list[SavedAdapter]:
    saved = [*open_all(request.adapters)]
    origins = [Origin(path=str(one), sha256=one.sha256) for one in saved]
    for n, one in enumerate(saved):
        if not (request.base.allow_other_base or same_adapters(one.over, origins[:n])):
            needed = " ".join(f"--over {origin.path}" for origin in one.over)
            raise LorafoldError(f"{one}: {mismatch_message(one.over, origins[:n])}; pass {needed}")
    if not request.base.allow_other_base and (base := request.base.in_files()):
        for one in saved:
            one.own_base.check(base, request.base.name)
    return saved


def set_up(request: RunRequest, console: Console, processes: Processes = ALONE) -> Setup:
    """Check the request, choose device and dtype, and tokenize the rows."""
    spec = check_request(request, console, processes)
    saved = saved_adapters(request) if request.over or request.init_adapter else []
    objective = objective_of(request, saved)
    if objective.reads:
        check_places(request, objective.reads)
    if saved and not objective.outputs:
        check_language_model(request.base, saved)
    storage = settled_base(request.recipe, spec, request.base.source, saved)
    request = with_length(request, saved, console)
    recipe = request.recipe.model_copy(update={"storage": storage})
    base = request.base.stored(storage)
    request = replace(request, recipe=recipe, base=base)
    if spec.trains_base:
        check_rounding(recipe.optimizer, [base.loaded_as.dtype])
    files = {"model": {"name": base.name, "sha256": base.identity}}
    for n, one in enumerate(saved):
        name = "init_adapter" if n == len(request.over) else request.below[n]
        files[name] = {"name": str(one), "sha256": of_adapter(one)}
    tokenizer, words = tokenizer_for(request, objective, console, saved)
    changes = recipe.chat_template, recipe.template_kwargs, recipe.allow_control_tokens
    changed = bool(words.ids or any(changes) or (request.init_adapter and saved[-1].own_tokenizer))
    day, dated = day_of(tokenizer), tokenizer
    if day:
        began = RunDirectory(request.out).recorded("day") if request.resume else None
        day = str(began or request.day or day)
        dated = on_day(tokenizer, day)
        written = "the date of each rendering" if day_of(dated) else f"{day} throughout this run"
        print_lines(console, f"the chat template inserts the date: {written}")
    feed, held_out, findings = tokenized(request, dated, objective, console)
    print_lines(console, f"base: {base.loaded_as.reason}")
    if recipe.strategy != "ddp" and isinstance(objective, OnPolicy):
        raise LorafoldError(
            f"strategy fsdp: found objective {recipe.objective}, which samples completions;"
            " expected another objective, or strategy ddp"
        )
    divides = recipe.strategy == "fsdp" and processes.count > 1
    setup = Setup(
        request, spec, objective, tokenizer, words, files, saved, changed, feed, held_out, findings,
        Sharded(processes) if divides else Replicated(processes), day,
    )  # fmt: skip
    if processes.count > 1:
        check_alike(setup)
    return setup


def check_alike(setup: Setup) -> None:
    """Raise, in all processes, unless they have the same code, files, rows, recipe and device."""
    request, processes = setup.request, setup.layout.processes
    recipe = request.recipe.model_dump(mode="json")
    here = {
        "lorafold": f"{version('lorafold')} ({of_code(*TRAINING)[:8]})",
        **{name: version(name) for name in COMPUTED_WITH},
        **{f"the files of {of['name']}": of["sha256"][:8] for of in setup.files.values()},
        "the rows": request.data.identity[:SHOWN],
        **{name: str(value) for name, value in depends_on(request, setup.objective).items()},
        **{name: str(value) for name, value in recipe.items()},
        "the device": request.base.where.type,
    }
    if request.resume:
        here["the run to resume"] = RunDirectory(request.out).checkpoint_label()
    (host, first), *each = processes.gather((socket.gethostname(), here))
    for number, (there, theirs) in enumerate(each, 1):
        if others := [
            f"{name}: {shortened(theirs.get(name, 'none'), SHOWN)} (process 0:"
            f" {shortened(first.get(name, 'none'), SHOWN)})"
            for name in {**first, **theirs}  # causes come before their effects
            if theirs.get(name) != first.get(name)
        ]:
            where = there if there == host else f"{there}, process 0 on {host}"
            raise LorafoldError(
                f"process {number} on {where}: found {listed(others, '; ', room=140)}; expected"
                " the same in all processes"
            )


def adapted_model(
    setup: Setup, console: Console
) -> tuple[PreTrainedModel, Adapter, Weights | None]:
    """(model, adapter, the base's original weights). Prints the memory estimate before it loads the
    model; the adapter is new, or `init_adapter`.
    """
    request, recipe, base = setup.request, setup.request.recipe, setup.request.base
    over, objective = setup.saved[: len(request.over)], setup.objective
    stored = setup.saved[-1] if request.init_adapter else None
    checkpointing, unknown = choose_checkpointing(
        base.config(), largest_setting(setup), recipe.gradient_checkpointing,
        min(setup.layout.processes.gather(free_bytes(base.where))), console,
    )  # fmt: skip
    with setup.layout.loading(base.where):
        model = objective.load(base, setup.tokenizer, recipe.seed)
    limit = positions_of(model).table
    if limit is not None and limit < recipe.max_length:
        check_positions(setup, model, limit)
    torch.manual_seed(recipe.seed)
    weights, other = base.weights(), base.allow_other_base
    setup.saved.clear()
    for n, one in enumerate(over):
        load(model, one, request.below[n], allow_other_base=other, base=weights)
    if stored is not None:
        adapter = load(model, stored, trainable=True, allow_other_base=other, base=weights)
    print_lines(console, unknown)
    if stored is None:
        adapter = attach(model, setup.spec, recipe.targets, base=weights, **extras(setup, model))
    elif missing := [
        path
        for path in objective.modules_to_save(model, adapter.spec, recipe.targets)
        if not isinstance(module_at(model, path), Adapted)
    ]:
        raise LorafoldError(
            f"--init-adapter {request.init_adapter}: the adapter has no {', '.join(missing)}, which"
            f" the objective {recipe.objective} must train; use an adapter that has it, or pass"
            " this one as --over to train a new adapter on top of it"
        )
    towers = Anatomy.of(model).encoders
    print_lines(
        console,
        text_only_note(model, adapter.sites) if towers else None,
        repr(adapter),
        f"  {unreached(model, adapter.sites)}",
        encoder_targets_note(model, adapter.matches) if towers else None,
    )
    if checkpointing:
        recompute(model)
    return model, adapter, weights


def largest_setting(setup: Setup) -> Setting:
    """The run's largest micro-batch, for a memory estimate before anything is loaded."""
    request, recipe, base = setup.request, setup.request.recipe, setup.request.base
    stored = setup.saved[-1] if request.init_adapter else None
    below = tuple((s.spec, s.attach_options) for s in setup.saved[: len(request.over)])
    extra = stored.attach_options if stored else partial(extras, setup)
    spec, shared = stored.spec if stored else setup.spec, setup.layout.processes.count
    setting = Setting(
        base.loaded_as, spec, recipe.targets, extra, below=below,
        trust_remote_code=base.trust_remote_code,
    )  # fmt: skip
    return largest_batch(
        recipe, setup.feed, setup.objective, setting, shared, base.where, setup.held_out,
        may_share(base.config()),
    )  # fmt: skip


def check_positions(setup: Setup, model: PreTrainedModel, limit: int) -> None:
    """Raise for a row with more tokens than the model has positions."""
    most = setup.request.recipe.max_length
    foreseen = (e for rows in islice(setup.feed.after(0), setup.feed.foreseen) for e in rows)
    held_out = setup.held_out.examples if setup.held_out else ()
    longest = max(
        len(document.ids)
        for e in chain(foreseen, held_out)
        for document in (e.documents() if isinstance(e, Branched) else (e,))
    )
    if longest > limit:
        raise LorafoldError(
            f"max_length {most}: found a row of {longest} tokens, expected at most the {limit}"
            f" positions of {type(model).__name__}; set max_length to {limit} to truncate rows"
        )


def extras(setup: Setup, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `attach` for modules trained in addition to the method: biases, full modules,
    and embeddings of tokens.
    """
    recipe, words = setup.request.recipe, setup.words
    needed = setup.objective.modules_to_save(model, setup.spec, recipe.targets)
    fresh = (path for path in needed if not isinstance(module_at(model, path), Adapted))
    tokens = TrainableTokens(
        tuple(words.ids.values()), frozenset(words.ids[word] for word in words.new)
    )
    return {
        "bias": recipe.bias, "modules_to_save": (*recipe.modules_to_save, *fresh), "tokens": tokens,
    }  # fmt: skip
