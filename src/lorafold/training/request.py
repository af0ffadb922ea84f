"""The request for a run, and what training and a preview make of it without a model: the objective,
the tokenizer and the tokenized rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorafold.data.batches import split
from lorafold.data.render import Rendering
from lorafold.data.sources import Row
from lorafold.models.sources import ModelSource, resolve_model
from lorafold.models.template_variables import set_variables
from lorafold.models.tokenizer import Words, add_words, set_template, tokenizer_of
from lorafold.step.recipe import Recipe
from lorafold.training.objectives import OBJECTIVES, Data, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """What to train, on which rows, and where to write the adapter.

    `out` must not exist unless `overwrite` or `resume` is set; without `eval_rows` the recipe's
    `eval_fraction` of `rows` is held out.
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


def digest(rows: Sequence[Row]) -> str:
    """The SHA-256 of the rows as JSON, so the same rows have one digest in every file format."""
    h = hashlib.sha256()
    for row in rows:
        h.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return h.hexdigest()


def rendering_of(recipe: Recipe) -> Rendering:
    """What of a conversation is trained on."""
    return Rendering(recipe.train_on, recipe.mask_reasoning)


def objective_of(request: Request) -> tuple[ModelSource, Objective]:
    """The model's directory, and the run's objective for it.

    Raises LorafoldError for a model that is not found, and labels that are not the model's.
    """
    source = resolve_model(request.model, request.revision)
    adapters = [request.init_adapter] if request.init_adapter else []
    return source, OBJECTIVES[request.recipe.objective](request.rows, source, adapters)


def tokenizer_for(
    request: Request, source: ModelSource, objective: Objective, console: Console
) -> tuple[PreTrainedTokenizerBase, Words]:
    """The tokenizer with the recipe's chat template and new tokens, and the ids of these tokens.

    Args:
        request: Names the chat template, the new tokens and the adapter to start from.
        source: The model, whose tokenizer is taken unless that adapter has its own.
        objective: Adds what the tokenizer lacks for it, such as a chat template.
        console: For notices of what was added.
    """
    adapters = [request.init_adapter] if request.init_adapter else []
    tokenizer = tokenizer_of(source, adapters, request.trust_remote_code)
    if request.recipe.chat_template is not None:
        set_template(tokenizer, request.recipe.chat_template)
    set_variables(tokenizer, request.recipe.template_kwargs)
    words = add_words(tokenizer, request.recipe.new_tokens)
    for notice in (str(words), objective.set_up(tokenizer)):
        if notice:
            console.print(notice, highlight=False, markup=False)
    return tokenizer, words


def tokenized(
    request: Request, tokenizer: PreTrainedTokenizerBase, objective: Objective, console: Console
) -> tuple[Data, Data | None]:
    """The examples to train on and those to measure on, which may be None; both are reported.

    Args:
        request: Has the rows, or the share of them that is held out.
        tokenizer: As `tokenizer_for` gives it.
        objective: Makes examples of rows.
        console: For the two reports, such as how many examples were cut.

    Raises LorafoldError for rows that the objective can't use.
    """
    rows, held_out = list(request.rows), request.eval_rows
    if held_out is None and request.recipe.eval_fraction:
        rows, held_out = split(rows, request.recipe.eval_fraction, request.recipe.seed)
    max_length, rendering = request.recipe.max_length, rendering_of(request.recipe)
    train = objective.encode(rows, tokenizer, max_length, rendering)
    console.print(f"data: {train.report}", highlight=False)
    if not held_out:
        return train, None
    evaluation = objective.encode(held_out, tokenizer, max_length, rendering)
    console.print(f"held out: {evaluation.report}", highlight=False)
    return train, evaluation
