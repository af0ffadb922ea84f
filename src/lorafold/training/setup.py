"""What a run settles before its first step: the checks of its request, the choices that need no
model, and the model with its adapter.

The cheap refusals come first, so that a wrong request fails before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lorafold.adapter import Adapter, attach, load
from lorafold.core.attach import Adapted, Origin
from lorafold.core.matrices import module_at
from lorafold.core.spec import Spec
from lorafold.data.branches import Branched
from lorafold.data.feed import Feed
from lorafold.data.findings import Findings
from lorafold.data.template_forms import day_of, is_dated, on_day
from lorafold.errors import LorafoldError
from lorafold.files.atomic import check_out
from lorafold.files.paths import check_name
from lorafold.machine.processes import ALONE, Processes
from lorafold.memory.before_run import planned, settle
from lorafold.memory.trace import Setting
from lorafold.methods.parts.token_rows import Tokens
from lorafold.models.positions import positions_of
from lorafold.models.tokenizer import Words
from lorafold.models.weights import Weights
from lorafold.objectives.objective import Data, Objective
from lorafold.opening.base import check_language_model
from lorafold.peft.provenance import mismatch, same
from lorafold.peft.saved import Saved, open_all
from lorafold.recipe.fields import OF_ADAPTER
from lorafold.recipe.fitting import settled_base, spec_of, without
from lorafold.step.adamw import check_available, check_rounding, free_everywhere
from lorafold.step.branches import may_share
from lorafold.step.replicated import Replicated
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.finish import best_path
from lorafold.training.request import (
    Request,
    files_of,
    objective_of,
    tokenized,
    tokenizer_for,
    with_length,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Setup:
    """The choices of a run that need no model; in `request` the storage of the base is settled."""

    request: Request
    spec: Spec
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    words: Words
    files: dict[str, dict[str, str]]
    saved: list[Saved]  # the adapters to load, lowest first; none once they are loaded
    own_tokenizer: bool  # whether the run's tokenizer differs from the base's
    feed: Feed
    held_out: Data | None
    findings: Findings
    processes: Processes
    day: str = ""  # what the chat template writes as the date; empty where it asks for none

    @property
    def below(self) -> list[str]:
        """What the model computes without the adapter that trains depends on: files, storage and
        device.
        """
        read = [of["sha256"] for name, of in self.files.items() if name != "init_adapter"]
        base = self.request.base
        return [*read, base.held.name, str(base.held.dtype), base.where.type]


def check_request(request: Request, console: Console, processes: Processes) -> Spec:
    """The spec of the recipe's method; a notice names the recipe's fields that it leaves out.

    Raises LorafoldError for an output that exists or is one of the adapters to load, a stopped run
    in `<out>.run`, a batch that can't be split over the processes, an optimizer that is not
    installed, an unknown method, and fields that an initial adapter fixes.
    """
    check_name(request.out)
    check_places(request)
    replaces, count = request.overwrite or request.resume, processes.count
    if processes.first:  # which alone writes
        for path in (request.out, best_path(request.out)):
            check_out(path, replaces)
        RunDirectory(request.out).check_free(replaces)
    if (batch := request.recipe.batch) % count:
        raise LorafoldError(
            f"batch {batch} can't be split over {count} processes; expected a multiple of {count}"
        )
    check_available(request.recipe.optimizer)
    spec = spec_of(request.recipe)
    if notice := without(request.recipe):
        console.print(notice, highlight=False)
    fixed = sorted(OF_ADAPTER & request.recipe.model_fields_set)
    if request.init_adapter and fixed:
        raise LorafoldError(
            f"{', '.join(fixed)}: the adapter of --init-adapter fixes these fields; remove them"
            " from the recipe"
        )
    if request.over and spec.trains_base:
        raise LorafoldError(
            f"--over: {request.recipe.method} trains the base's own weights and writes a plain"
            " model, which nothing lies below; merge these adapters first"
        )
    return spec


def check_places(request: Request) -> None:
    """Raise LorafoldError for an output that is an adapter to load."""
    loaded = [("--over", path) for path in request.over]
    loaded += [("--init-adapter", path) for path in request.adapters[len(request.over) :]]
    check_apart(request, loaded)


def check_apart(request: Request, read: Iterable[tuple[str, Path]]) -> None:
    """Raise LorafoldError if what the run writes is, contains or lies in what it reads.

    Args:
        read: Directories, each after the option that names it.
    """
    written = (request.out, best_path(request.out), RunDirectory(request.out).path)
    for option, path in read:
        adapter = path.resolve()
        for target in (w.resolve() for w in written):
            if target.is_relative_to(adapter) or adapter.is_relative_to(target):
                raise LorafoldError(
                    f"--out {request.out}: the run would write {target} and read {option} {path};"
                    " expected another directory, beside it"
                )


def saved_adapters(request: Request) -> list[Saved]:
    """The adapters that the run loads, lowest first. Raises LorafoldError if one of them was
    trained on another base, or over others than those of `over` that are below it.
    """
    found = [*open_all(request.adapters)]
    origins = [Origin(path=str(one), sha256=one.sha256) for one in found]
    for n, one in enumerate(found):
        if not (request.base.allow_other_base or same(one.over, origins[:n])):
            needed = " ".join(f"--over {origin.path}" for origin in one.over)
            raise LorafoldError(f"{one}: {mismatch(one.over, origins[:n])}; give {needed}")
    if found and not request.base.allow_other_base and (base := request.base.in_files()):
        for one in found:
            one.own_base.check(base, request.base.name)
    return found


def set_up(request: Request, console: Console, processes: Processes = ALONE) -> Setup:
    """Check the request, choose device and storage, and tokenize the rows.

    Raises LorafoldError for anything wrong with the request or its rows.
    """
    spec = check_request(request, console, processes)
    saved = saved_adapters(request)
    objective = objective_of(request, saved)
    check_apart(request, objective.reads)
    if saved and not objective.outputs:
        check_language_model(request.base, saved)
    storage = settled_base(request.recipe, spec, request.base.source, saved)
    request = with_length(request, saved, console)
    recipe = request.recipe.model_copy(update={"storage": storage})
    base = request.base.stored(storage)
    request = replace(request, recipe=recipe, base=base)
    if spec.trains_base:
        check_rounding(recipe.optimizer, [base.held.dtype])
    files = files_of(request, saved)
    tokenizer, words = tokenizer_for(request, objective, console, saved)
    inherited = request.init_adapter is not None and saved[-1].own_tokenizer
    changes = recipe.chat_template, recipe.template_kwargs, recipe.allow_control_tokens
    own = bool(words.ids or any(changes) or inherited)
    day, dated = day_of(tokenizer), tokenizer
    if day:
        began = RunDirectory(request.out).written("day") if request.resume else None
        day = str(began or request.day or day)
        dated = on_day(tokenizer, day)
        held = "the day of each rendering" if is_dated(dated) else f"{day} throughout this run"
        console.print(f"the chat template writes the date: {held}", highlight=False)
    feed, held_out, findings = tokenized(request, dated, objective, console)
    console.print(f"base: {base.held.why}", highlight=False)
    return Setup(
        request, spec, objective, tokenizer, words, files, saved, own, feed, held_out,
        findings, processes, day,
    )


def adapted_model(
    setup: Setup, console: Console, layout: Replicated
) -> tuple[PreTrainedModel, Adapter, Weights | None, bool]:
    """(model, adapter, the base's own weights, whether to recompute activations).

    The memory of a step is estimated and printed before the model is loaded. The adapter is new, or
    the one that `init_adapter` names; those of `over` are below it. Of the model each process keeps
    what the layout has it keep.
    """
    request, recipe, base = setup.request, setup.request.recipe, setup.request.base
    over = setup.saved[: len(request.over)]
    stored = setup.saved[-1] if request.init_adapter else None
    heaviest = largest_setting(setup)
    free = free_everywhere(base.where, setup.processes)
    asked = recipe.gradient_checkpointing
    checkpointing, unknown = settle(base.config(), heaviest, asked, free, console)
    with layout.loading(base.where):
        model = setup.objective.load(base, setup.tokenizer, recipe.seed)
    check_positions(setup, model)
    torch.manual_seed(recipe.seed)
    weights, other = base.weights(), base.allow_other_base
    setup.saved.clear()
    for name, one in zip(request.below, over, strict=True):
        load(model, one, name, allow_other_base=other, base=weights)
    if stored is not None:
        adapter = load(model, stored, trainable=True, allow_other_base=other, base=weights)
    if unknown:
        console.print(unknown, highlight=False, soft_wrap=True, markup=False)
    if stored is None:
        fresh = extras(setup, model)
        adapter = attach(model, setup.spec, recipe.targets, base=weights, **fresh)
        return model, adapter, weights, checkpointing
    if missing := untrained(setup, model, adapter.spec):
        raise LorafoldError(
            f"--init-adapter {request.init_adapter}: found no {', '.join(missing)}, which the"
            f" objective {recipe.objective} has to train, expected an adapter with it; as the"
            " frozen adapter below a new one, give it as --over"
        )
    return model, adapter, weights, checkpointing


def largest_setting(setup: Setup) -> Setting:
    """What the memory of the run's largest micro-batch is estimated from, before anything is
    loaded.
    """
    request, recipe, base = setup.request, setup.request.recipe, setup.request.base
    stored = setup.saved[-1] if request.init_adapter else None
    below = tuple((s.spec, s.beside) for s in setup.saved[: len(request.over)])
    extra = stored.beside if stored else partial(extras, setup)
    spec, shared = stored.spec if stored else setup.spec, setup.processes.count
    trusted = base.trust_remote_code
    asked = Setting(base.held, spec, recipe.targets, extra, below=below, trust_remote_code=trusted)
    return planned(
        recipe, setup.feed, setup.objective, asked, shared, base.where, setup.held_out,
        may_share(base.config()),
    )  # fmt: skip


def check_positions(setup: Setup, model: PreTrainedModel) -> None:
    """Raise LorafoldError for a row of more tokens than the model has positions."""
    limit, most = positions_of(model).table, setup.request.recipe.max_length
    if limit is None or most <= limit:
        return
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
            f" positions of {type(model).__name__}; a max_length of {limit} cuts rows there"
        )


def untrained(setup: Setup, model: PreTrainedModel, spec: Spec) -> list[str]:
    """The paths of the modules that the objective needs trained and no adapter has trained yet.

    Args:
        setup: Has the objective.
        model: As the objective loads it, with adapters attached.
        spec: The method.
    """
    needed = setup.objective.modules_to_save(model, spec, setup.request.recipe.targets)
    return [path for path in needed if not isinstance(module_at(model, path), Adapted)]


def extras(setup: Setup, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `attach` for what is trained in addition to the method: biases, whole modules,
    and the embeddings of tokens.
    """
    recipe, words = setup.request.recipe, setup.words
    needed = untrained(setup, model, setup.spec)
    tokens = Tokens(tuple(words.ids.values()), frozenset(words.ids[word] for word in words.new))
    saved = (*recipe.modules_to_save, *needed)
    return {"bias": recipe.bias, "modules_to_save": saved, "tokens": tokens}
