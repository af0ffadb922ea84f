"""What objectives of preferences have in common, whatever completions are measured by: examples of
pairs or of judged completions, each prompt once, and a law over them as the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafold.data.branches import Branched, Branches
from lorafold.data.examples import WHOLE, preview
from lorafold.data.preferred import PreferredData, encode_preferred
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoder
from lorafold.step.branches import branching
from lorafold.step.preference_laws import Law
from lorafold.step.preferences import Preferences
from lorafold.training.objectives.objective import Objective

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Comparing(Objective):
    """Abstract: an objective of preferences."""

    law: Law

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return ensure_chat_template(tokenizer)

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        console: Console,
        rendering: Rendering = WHOLE,
    ) -> PreferredData:
        return encode_preferred(rows, tokenizer, max_length, self.law.kind, console, rendering)

    def encoder(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE
    ) -> Encoder:
        return Branches(tokenizer, self.law.kind, rendering)

    def trained(self, example: Branched) -> Branched:
        return example.some(slice(self.law.trained))

    def preview(self, example: Branched, tokenizer: PreTrainedTokenizerBase) -> Text:
        from rich.text import Text

        judged = "desirable" if example.desirable else "undesirable"
        names = ("chosen", "rejected") if self.law.kind == "pairs" else (judged, "mismatched")
        shown = zip(names, example.documents(), strict=True)
        parts = [Text(f"{name}:\n").append(preview(of, tokenizer)) for name, of in shown]
        return Text("\n").join(parts)

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Iterator[Preferences]:
        pad = self.padding(tokenizer)
        if not packing:
            yield Preferences(model, self.law, None, pad)
            return
        with branching(model) as how:
            if not how.shares:
                instead = (
                    "each completion has its prompt before it"
                    if how.packs
                    else "completions are padded"
                )
                console.print(
                    "packing: this model does not compute a prompt once for several completions;"
                    f" {instead}",
                    highlight=False,
                )
            elif how.longest is not None:
                console.print(
                    f"packing: in rows of more than {how.longest} tokens, a chunk of this model's"
                    " attention, each completion has its prompt before it",
                    highlight=False,
                )
            yield Preferences(model, self.law, how, pad)

    def padding(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that fills short sequences, which the mask hides."""
        return tokenizer.pad_token_id or 0
