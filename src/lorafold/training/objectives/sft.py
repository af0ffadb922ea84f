"""Supervised fine-tuning: the next token of completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.data.completions import Completions
from lorafold.data.examples import WHOLE, Encoded, Example, encode, preview
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoder
from lorafold.models.sources import ModelSource
from lorafold.recipe.recipe import Recipe
from lorafold.step.documents import packed
from lorafold.step.losses import Completions as CompletionLoss
from lorafold.step.losses import Loss
from lorafold.training.objectives.objective import Objective, no_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sft(Objective):
    """Supervised fine-tuning: the next token of completions."""

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return ensure_chat_template(tokenizer)

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        console: Console,
        rendering: Rendering = WHOLE,
    ) -> Encoded:
        return encode(rows, tokenizer, max_length, console, rendering)

    def encoder(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE
    ) -> Encoder:
        return Completions(tokenizer, rendering)

    def preview(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
        return preview(example, tokenizer)

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Iterator[Loss]:
        if not packing:
            yield CompletionLoss(model, False, tokenizer.pad_token_id or 0)
            return
        with packed(model) as apart:
            if not apart:
                console.print(
                    "packing: in this model documents of one sequence influence each other, so"
                    " examples are padded instead",
                    highlight=False,
                )
            yield CompletionLoss(model, apart, tokenizer.pad_token_id or 0)


def sft(
    recipe: Recipe, rows: Sequence[Row], source: ModelSource, adapters: Sequence[Path]
) -> Sft:
    """The objective, which has no choices of its own; arguments as in `OBJECTIVES`.

    Args:
        recipe: Has no option of this objective.
        rows: Conversations, completions or text.
        source: The model.
        adapters: Saved adapters that will be loaded on it.
    """
    no_options(recipe)
    return Sft()
