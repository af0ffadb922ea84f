"""What objectives of preferences have in common, whatever completions are measured by: examples of
pairs or of judged completions, each prompt once, and a law over them as the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from lorafold.data.branches import Branched, Branches, PreferredData, preferred
from lorafold.data.examples import WHOLE, preview
from lorafold.data.findings import account_of
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.shapes import PAIRS
from lorafold.data.stored import Rows
from lorafold.data.tokenizing import Encoder
from lorafold.objectives import OBJECTIVES, Declared
from lorafold.objectives.laws import class_of, made
from lorafold.objectives.objective import Asked, Objective, Packing, given_options
from lorafold.step import preference_laws
from lorafold.step.branches import branching
from lorafold.step.preference_laws import Law
from lorafold.step.preferences import Preferences

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Comparing(Objective):
    """Abstract: an objective of preferences."""

    law: Law

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """The objective with the law that its row of the table names, and its options."""
        return cls(law_of(asked.name, asked.beta, asked.options))

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        law = class_of(declared, preference_laws)
        return {field.name: field.default for field in fields(law)}

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return ensure_chat_template(tokenizer) or account_of(tokenizer).line

    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return Branches(tokenizer, self.law.kind, rendering)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> PreferredData:
        return preferred(table, rows, max_length, self.law.kind)

    def trained(self, example: Branched) -> Branched:
        return example.some(slice(self.law.trained))

    def preview(self, example: Branched, tokenizer: PreTrainedTokenizerBase) -> Text:
        from rich.text import Text

        judged = "desirable" if example.desirable else "undesirable"
        names = ("chosen", "rejected") if self.law.kind == PAIRS else (judged, "mismatched")
        shown = zip(names, example.documents(), strict=True)
        parts = [Text(f"{name}:\n").append(preview(of, tokenizer)) for name, of in shown]
        return Text("\n").join(parts)

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: Packing,
        console: Console,
    ) -> Iterator[Preferences]:
        pad = self.padding(tokenizer)
        if not packing:
            yield Preferences(model, self.law, None, pad)
            return
        with branching(model, across=packing == "auto") as how:
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


def law_of(objective: str, beta: float | None, options: Mapping[str, Any]) -> Law:
    """The law of an objective.

    Args:
        objective: A name in OBJECTIVES, of one that has a law.
        beta: Its beta; None takes the law's own.

    Raises LorafoldError for an option that the law does not have, or a value out of its range.
    """
    law: Law = made(
        class_of(OBJECTIVES[objective], preference_laws), given_options(beta, options), objective
    )
    return law
