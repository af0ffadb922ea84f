"""What a run means that an earlier version of lorafold began: it ends as it would have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from lorafold.data.endings import WITH_TURN, ending_of
from lorafold.data.stored import Rows
from lorafold.data.stream import RowStream
from lorafold.errors import listed
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.request import Request
from lorafold.training.setup import Setup

# Fields whose default was another in earlier versions, with what those wrote.
DEFAULTS_BEFORE: dict[str, tuple[Any, ...]] = {"epochs": (1.0,), "packing": (True, False)}


def as_begun(request: Request) -> Request:
    """The request, with what it leaves to the defaults as in the run that is resumed: earlier
    versions had others.
    """
    if not request.resume:
        return request
    run = RunDirectory(request.out)
    return with_defaults_of({name: run.written(name) for name in DEFAULTS_BEFORE}, request)


def with_defaults_of(found: Mapping[str, Any], request: Request) -> Request:
    """The request with fields that it leaves to the defaults as `found` has them, where that is a
    default of an earlier version.
    """
    left = DEFAULTS_BEFORE.keys() - request.recipe.model_fields_set
    update = {name: found[name] for name in left if found.get(name) in DEFAULTS_BEFORE[name]}
    return replace(request, recipe=request.recipe.model_copy(update=update))


def streamed_before(data: Rows | RowStream, run: RunDirectory, console: Console) -> dict[str, str]:
    """How a run of an earlier version knew files that it streams: by their sizes, which is said."""
    written = run.written("data")
    if not isinstance(data, RowStream) or written not in {data.identity_before} - {data.identity}:
        return {}
    told = (
        f"{run.path}: an earlier lorafold began this run and did not say what was in"
        f" {listed(data.sources)}: whether the rows are the same can't be checked"
    )
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    return {"data": written}


def ends_before(setup: Setup) -> dict[str, str]:
    """How turns ended in runs of earlier versions: as the template writes it, or not at all."""
    tokenizer, recipe = setup.tokenizer, setup.request.recipe
    written = tokenizer.chat_template is None or ending_of(tokenizer).written == WITH_TURN
    return {"end_of_turn": recipe.end_of_turn if written else "none"}
