"""The setup of a run: checks of its request (before anything is loaded), its settings, and the
model.
"""

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
from lorafold.core.expert_matrices import module_at
from lorafold.core.spec import Spec
from lorafold.data.batches import BatchFeed
from lorafold.data.chat_template import date_used, with_date
from lorafold.data.preference_examples import BranchedRow
from lorafold.data.row_checks import Findings
from lorafold.errors import LorafoldError, listed, truncate_middle
from lorafold.files.atomic import check_out
from lorafold.files.terminal import print_lines
from lorafold.identity import COMPUTED_WITH, TRAINING, of_adapter, of_code
from lorafold.memory.preflight import choose_checkpointing, largest_batch
from lorafold.memory.trace import MemorySetting
from lorafold.methods.common.trainable_tokens import TrainableTokens
from lorafold.models.positions import positions_of
from lorafold.models.tokenizer import AddedTokens
from lorafold.models.weights import Weights
from lorafold.objectives.objective import Data, Objective, OnPolicy
from lorafold.peft.adapter_directory import SavedAdapter, open_all
from lorafold.peft.form import format_of
from lorafold.peft.provenance import mismatch_message, same_adapters
from lorafold.recipe.fields import ADAPTER_FIELDS
from lorafold.recipe.resolve_settings import ignored_note, resolve_storage, spec_of
from lorafold.resolve.base import check_language_model
from lorafold.runtime.memory import free_bytes
from lorafold.runtime.processes import SINGLE_PROCESS, Processes
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.inputs import (
    RunRequest,
    input_identity,
    objective_of,
    prepare_tokenizer,
    tokenize_rows,
    with_max_length,
)
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from lorafold.training_step.optimizers import bitsandbytes_optimizers, check_rounding
from lorafold.training_step.sharded_data_parallel import Sharded
from lorafold.training_step.shared_prefixes import may_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_SHOWN_CHARS = 40  # characters of a value


@dataclass(frozen=True)
class Setup:
    """The settings of a run that are chosen before the model is loaded; `request.base` has the
    chosen dtype or quantization.
    """

    request: RunRequest
    spec: Spec
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    added_tokens: AddedTokens
    files: dict[str, dict[str, str]]
    saved: list[SavedAdapter]  # the adapters to load, lowest first; none once they are loaded
    own_tokenizer: bool  # whether the run's tokenizer differs from the base's
    feed: BatchFeed
    held_out: Data | None
    findings: Findings
    layout: Replicated  # the placement of tensors among the processes
    day: str = ""  # the date in the chat template; empty if it has none


def check_request(request: RunRequest, console: Console, processes: Processes) -> Spec:
    """Checks the request, prints the fields that the method ignores, and returns the spec."""
    if request.over or request.init_adapter:
        check_paths_disjoint(request)
    run, replaces = RunDirectory(request.out), request.overwrite or request.resume
    count = processes.count
    if processes.first:  # only rank 0 writes
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
    if note := ignored_note(request.recipe):
        print_lines(console, note)
    fixed = sorted(ADAPTER_FIELDS & request.recipe.model_fields_set)
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


def check_paths_disjoint(request: RunRequest, others: Iterable[tuple[str, Path]] = ()) -> None:
    """Raises if a path that the run writes contains a path that it reads, or lies in one."""
    run = RunDirectory(request.out)
    inputs = [*(("--over", path) for path in request.over), *others]
    if request.init_adapter:
        inputs.append(("--init-adapter", request.init_adapter))
    for option, path in inputs:
        resolved = path.resolve()
        for target in (output.resolve() for output in (run.out, run.best, run.path)):
            if target.is_relative_to(resolved) or resolved.is_relative_to(target):
                raise LorafoldError(
                    f"--out {request.out}: the run would write {target}, which overlaps with the"
                    f" input {option} {path}; choose a directory outside of it"
                )


def open_adapters(request: RunRequest) -> list[SavedAdapter]:
    saved = [*open_all(request.adapters)]
    origins = [Origin(path=str(one), sha256=one.sha256) for one in saved]
    for n, adapter in enumerate(saved):
        if not (request.base.allow_other_base or same_adapters(adapter.over, origins[:n])):
            options = " ".join(f"--over {origin.path}" for origin in adapter.over)
            found = mismatch_message(adapter.over, origins[:n])
            raise LorafoldError(f"{adapter}: {found}; pass {options}")
    if not request.base.allow_other_base and (base := request.base.in_files()):
        for adapter in saved:
            adapter.own_base.check(base, request.base.name)
    return saved


def set_up(request: RunRequest, console: Console, processes: Processes = SINGLE_PROCESS) -> Setup:
    """Checks the request, chooses device and dtype, and tokenizes the rows."""
    spec = check_request(request, console, processes)
    saved = open_adapters(request) if request.over or request.init_adapter else []
    objective = objective_of(request, saved)
    if objective.reads:
        check_paths_disjoint(request, objective.reads)
    if saved and not objective.outputs:
        check_language_model(request.base, saved)
    storage = resolve_storage(request.recipe, spec, request.base, saved)
    request = with_max_length(request, saved, console)
    recipe = request.recipe.model_copy(update={"storage": storage})
    base = request.base.stored(storage)
    request = replace(request, recipe=recipe, base=base)
    if spec.trains_base:
        check_rounding(recipe.optimizer, [base.loaded_as.dtype])
    files = {"model": {"name": base.name, "sha256": base.identity}}
    for n, adapter in enumerate(saved):
        name = "init_adapter" if n == len(request.over) else request.over_names[n]
        files[name] = {"name": str(adapter), "sha256": of_adapter(adapter)}
    tokenizer, added = prepare_tokenizer(request, objective, console, saved)
    changes = added.ids, recipe.chat_template, recipe.template_kwargs, recipe.allow_control_tokens
    own_tokenizer = any(changes) or base.words is not None
    own_tokenizer = own_tokenizer or bool(request.init_adapter and saved[-1].own_tokenizer)
    day, dated_tokenizer = date_used(tokenizer), tokenizer
    if day:
        recorded_day = RunDirectory(request.out).recorded("day") if request.resume else None
        day = str(recorded_day or request.day or day)
        dated_tokenizer = with_date(tokenizer, day)
        fixed = "" if date_used(dated_tokenizer) else f"{day} throughout this run"
        date = fixed or "the date of each rendering"
        print_lines(console, f"the chat template inserts the date: {date}", detail=True)
    feed, held_out, findings = tokenize_rows(request, dated_tokenizer, objective, console)
    steps = f"steps: {feed.steps}, rows per step: {recipe.batch}"
    print_lines(console, f"base: {base.name} ({base.loaded_as.reason}); {steps}")
    if recipe.strategy != "ddp" and isinstance(objective, OnPolicy):
        raise LorafoldError(
            f"strategy fsdp does not support the objective {recipe.objective}, which samples"
            " completions; use strategy ddp or another objective"
        )
    is_sharded = recipe.strategy == "fsdp" and processes.count > 1
    setup = Setup(
        request, spec, objective, tokenizer, added, files, saved, own_tokenizer, feed, held_out,
        findings, Sharded(processes) if is_sharded else Replicated(processes), day,
    )  # fmt: skip
    if processes.count > 1:
        check_processes_agree(setup)
    return setup


def check_processes_agree(setup: Setup) -> None:
    """Raises, in all processes, unless they have the same code, files, rows, recipe and device."""
    request, processes = setup.request, setup.layout.processes
    recipe = request.recipe.model_dump(mode="json")
    own_inputs = {
        "lorafold": f"{version('lorafold')} ({of_code(*TRAINING)[:8]})",
        **{name: version(name) for name in COMPUTED_WITH},
        **{f"the files of {of['name']}": of["sha256"][:8] for of in setup.files.values()},
        "the rows": request.data.identity[:MAX_SHOWN_CHARS],
        **{name: str(value) for name, value in input_identity(request, setup.objective).items()},
        **{name: str(value) for name, value in recipe.items()},
        "the device": request.base.where.type,
    }
    if request.resume:
        own_inputs["the run to resume"] = RunDirectory(request.out).checkpoint_label()
    (host, first), *others = processes.gather((socket.gethostname(), own_inputs))
    for number, (other_host, other) in enumerate(others, 1):
        if differences := [
            f"{name}: {truncate_middle(other.get(name, 'none'), MAX_SHOWN_CHARS)} (rank 0:"
            f" {truncate_middle(first.get(name, 'none'), MAX_SHOWN_CHARS)})"
            for name in {**first, **other}  # causes come before their effects
            if other.get(name) != first.get(name)
        ]:
            hosts = other_host if other_host == host else f"{other_host}, rank 0 on {host}"
            raise LorafoldError(
                f"rank {number} on {hosts}: found {listed(differences, '; ', max_chars=140)};"
                " expected the same on all ranks"
            )


def load_adapted_model(
    setup: Setup, console: Console
) -> tuple[PreTrainedModel, Adapter, Weights | None]:
    """The model, the adapter (new, or `init_adapter`), and the base's original weights or None.
    Prints the memory estimate before it loads the model.
    """
    request, recipe, base = setup.request, setup.request.recipe, setup.request.base
    over_adapters, objective = setup.saved[: len(request.over)], setup.objective
    init_adapter = setup.saved[-1] if request.init_adapter else None
    loaded_bytes = base.loaded.get_memory_footprint() if base.loaded is not None else 0
    checkpointing, no_estimate_line = choose_checkpointing(
        base.config(), largest_memory_setting(setup), recipe.gradient_checkpointing,
        min(setup.layout.processes.gather(free_bytes(base.where))) + loaded_bytes, console,
    )  # fmt: skip
    with setup.layout.loading(base.where):
        model = objective.load(base, setup.tokenizer, recipe.seed)
    limit = positions_of(model).table
    if limit is not None and limit < recipe.max_length:
        check_positions(setup, model, limit)
    torch.manual_seed(recipe.seed)
    weights, other = base.weights(), base.allow_other_base
    setup.saved.clear()
    for n, saved in enumerate(over_adapters):
        load(model, saved, request.over_names[n], allow_other_base=other, base=weights)
    if init_adapter is not None:
        adapter = load(model, init_adapter, trainable=True, allow_other_base=other, base=weights)
    print_lines(console, no_estimate_line)
    if init_adapter is None:
        options = extra_attach_options(setup, model)
        adapter = attach(model, setup.spec, recipe.targets, base=weights, **options)
        if not adapter.spec.trains_base:  # raises before training if there is no file format
            format_of(model, adapter.spec, adapter.matches.paths)
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
    left_out = unreached(model, adapter.sites)
    print_lines(console, repr(adapter), detail=True)
    print_lines(console, left_out, detail="experts" not in left_out.blocks)
    if Anatomy.of(model).encoders:
        note = encoder_targets_note(model, adapter.matches)
        print_lines(console, text_only_note(model, adapter.sites), note)
    if checkpointing:
        enable_gradient_checkpointing(model)
    return model, adapter, weights


def largest_memory_setting(setup: Setup) -> MemorySetting:
    """The setting of the run's largest micro-batch, for a memory estimate before anything is
    loaded.
    """
    request, recipe, base = setup.request, setup.request.recipe, setup.request.base
    init_adapter = setup.saved[-1] if request.init_adapter else None
    options = init_adapter.attach_options if init_adapter else partial(extra_attach_options, setup)
    setting = MemorySetting(
        base.loaded_as, init_adapter.spec if init_adapter else setup.spec, recipe.targets, options,
        below=tuple((one.spec, one.attach_options) for one in setup.saved[: len(request.over)]),
        trust_remote_code=base.trust_remote_code,
    )  # fmt: skip
    return largest_batch(
        recipe, setup.feed, setup.objective, setting, setup.layout.processes.count, base.where,
        setup.held_out, may_share(base.config()),
    )  # fmt: skip


def check_positions(setup: Setup, model: PreTrainedModel, limit: int) -> None:
    """Raises if a row has more tokens than the model has positions."""
    known = (e for rows in islice(setup.feed.after(0), setup.feed.num_previewed) for e in rows)
    held_out = setup.held_out.examples if setup.held_out else ()
    longest = max(
        len(document.ids)
        for e in chain(known, held_out)
        for document in (e.documents() if isinstance(e, BranchedRow) else (e,))
    )
    if longest > limit:
        raise LorafoldError(
            f"max_length {setup.request.recipe.max_length}: found a row of {longest} tokens,"
            f" expected at most the {limit} positions of {type(model).__name__}; set max_length to"
            f" {limit} to truncate rows"
        )


def extra_attach_options(setup: Setup, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of `attach` for parameters that are trained in addition to the method: biases,
    full modules, and token embeddings.
    """
    recipe, added = setup.request.recipe, setup.added_tokens
    needed = setup.objective.modules_to_save(model, setup.spec, recipe.targets)
    heads = (path for path in needed if not isinstance(module_at(model, path), Adapted))
    tokens = TrainableTokens(
        tuple(added.ids.values()), frozenset(added.ids[token] for token in added.new)
    )
    return {
        "bias": recipe.bias, "modules_to_save": (*recipe.modules_to_save, *heads), "tokens": tokens,
    }  # fmt: skip
