"""Supervised fine-tuning: next-token prediction on completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafold.data.examples import WHOLE, CompletionEncoder, Example, encoded, preview
from lorafold.data.render import Rendering
from lorafold.data.row_store import Rows
from lorafold.data.tokenizing import Encoded, Encoder
from lorafold.files.terminal import print_lines
from lorafold.objectives.objective import Objective, Packing
from lorafold.training_step.losses import CompletionLoss, Loss
from lorafold.training_step.shared_prefixes import sharing_prefixes

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sft(Objective):
    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return CompletionEncoder(tokenizer, rendering)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Encoded:
        return encoded(table, rows, max_length)

    def preview(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
        return preview(example, tokenizer)

    @contextmanager
    def loss(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packing: Packing,
        console: Console,
    ) -> Iterator[Loss]:
        if not packing:
            yield CompletionLoss(model, False, tokenizer.pad_token_id or 0)
            return
        with sharing_prefixes(model, across=packing == "auto") as support:
            pad_id, notice = tokenizer.pad_token_id or 0, ""
            loss = CompletionLoss(model, support.packs, pad_id, support)
            if not support.packs:
                notice = (
                    "packing: this model does not support packed examples, so examples are padded"
                    " instead"
                )
            elif packing == "auto" and loss.support is None:
                notice = (
                    "packing: this model can't compute shared prefixes once; each row is computed"
                    " separately, which may need more memory than estimated"
                )
            print_lines(console, notice)
            yield loss
