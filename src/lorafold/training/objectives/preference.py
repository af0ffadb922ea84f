"""Objectives of preferences: the log-probabilities of completions, and a law over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorafold.data.branches import Branched, BranchedExamples, Branches
from lorafold.data.checking import check_objective
from lorafold.data.examples import WHOLE, preview
from lorafold.data.feed import Feed, StoredFeed
from lorafold.data.preferred import PreferredData, encode_preferred
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.sources import Row
from lorafold.data.stored import Rows
from lorafold.data.tokenizing import Encoder
from lorafold.evaluation import Measured
from lorafold.evaluation.preferences import preference_figures
from lorafold.models.loading import load_model
from lorafold.models.sources import ModelSource
from lorafold.step.branches import branching
from lorafold.step.preference_laws import Law, law_of
from lorafold.step.preferences import Preferences
from lorafold.step.recipe import Recipe
from lorafold.training.objectives.objective import Data, ModelRequest, Objective
from lorafold.training.objectives.reference import moves, referenced

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

@dataclass(frozen=True)
class Preference(Objective):
    """Preferring completions to others, by a law; the reference is the model without the adapter
    that trains.
    """

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

    def preview(self, example: Branched, tokenizer: PreTrainedTokenizerBase) -> Text:
        from rich.text import Text

        judged = "desirable" if example.desirable else "undesirable"
        names = ("chosen", "rejected") if self.law.kind == "pairs" else (judged, "mismatched")
        shown = zip(names, example.documents(), strict=True)
        parts = [Text(f"{name}:\n").append(preview(of, tokenizer)) for name, of in shown]
        return Text("\n").join(parts)

    def load(self, request: ModelRequest) -> PreTrainedModel:
        return load_model(
            request.source,
            request.storage,
            request.device,
            trust_remote_code=request.trust_remote_code,
        )

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Iterator[Preferences]:
        pad = tokenizer.pad_token_id or 0
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
            yield Preferences(model, self.law, how, pad)

    def refer(
        self, loss: Preferences, feed: Feed, held_out: Data | None, console: Console
    ) -> tuple[Feed, Data | None]:
        if not self.law.has_reference:
            return feed, held_out
        if isinstance(feed, StoredFeed) and (moves(loss.model) or feed.passes >= 1):
            feed = feed.with_examples(partial(referenced, loss, console=console))
        else:
            console.print("reference: log-probabilities are computed in each step", highlight=False)
        if moves(loss.model) and isinstance(held_out, PreferredData):
            known = referenced(loss, cast(BranchedExamples, held_out.examples), console)
            held_out = replace(held_out, examples=known)
        return feed, held_out

    def measure(self, loss: Preferences, held_out: Any) -> Measured:
        reference = self.law.has_reference and not moves(loss.model)
        found = preference_figures(loss, held_out.examples, reference)
        return Measured(found.preference_loss, found.as_json(), f", {found}")


def preference(
    recipe: Recipe, rows: Sequence[Row], source: ModelSource, adapters: Sequence[Path]
) -> Preference:
    """The objective that the recipe names, with its options.

    Args:
        recipe: Names the objective.
        rows: Rows of preferences, or of judged completions.
        source: The model.
        adapters: Saved adapters that will be loaded on it.

    Raises LorafoldError for options that the objective does not have, and rows of other shapes.
    """
    law = law_of(recipe.objective, recipe.beta, recipe.objective_options)
    check_objective(Rows.of(rows).firsts(), recipe.objective)
    return Preference(law)
