"""What a run is asked for and what comes of it, and what both need before there is a model: the
objective, the tokenizer, the tokenized rows.
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
from lorafold.data.rows import Row
from lorafold.models.sources import ModelSource, resolve_model
from lorafold.models.tokenizer import Words, add_words, set_template, tokenizer_of
from lorafold.step.recipe import Recipe
from lorafold.training.objectives import OBJECTIVES, Data, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
