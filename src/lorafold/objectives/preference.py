"""Objectives of preferences: the log-probabilities of completions, and a law over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lorafold.data.branches import BranchedExamples
from lorafold.data.feed import Feed, StoredFeed
from lorafold.data.preferred import PreferredData
from lorafold.evaluation import Measured
from lorafold.evaluation.preferences import preference_figures
from lorafold.objectives.comparing import Comparing
from lorafold.objectives.reference import moves, referenced
from lorafold.step.preferences import Preferences
from lorafold.step.replicated import Replicated

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Preference(Comparing):
    """Preferring completions to others, by a law; the reference is the model without the adapter
    that trains.
    """

    def refer(
        self, loss: Preferences, feed: Feed, held_out: Any, below: Sequence[str], console: Console,
        layout: Replicated,
    ) -> tuple[Feed, Any]:
        if not self.law.has_reference:
            return feed, held_out
        if isinstance(feed, StoredFeed) and (moves(loss.model) or feed.passes >= 1):
            refer = partial(referenced, loss, below=below, console=console, layout=layout)
            feed = feed.with_examples(refer)
        else:
            console.print("reference: log-probabilities are computed in each step", highlight=False)
        if moves(loss.model) and isinstance(held_out, PreferredData):
            own = cast(BranchedExamples, held_out.examples)
            known = referenced(loss, own, below, console, layout)
            held_out = replace(held_out, examples=known)
        return feed, held_out

    def measure(self, loss: Preferences, held_out: Any) -> Measured:
        reference = self.law.has_reference and not moves(loss.model)
        found = preference_figures(loss, held_out.examples, reference)
        return Measured(found.preference_loss, found.as_json(), f", {found}")
