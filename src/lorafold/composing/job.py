"""What every composition is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.composing.updates import Updates
from lorafold.core.targets import Matches
from lorafold.data.rows import Row
from lorafold.errors import LorafoldError
from lorafold.files.card import training_card
from lorafold.files.record import base_trained_on
from lorafold.methods.parts.mixture import Gating
from lorafold.models.sources import ModelSource
from lorafold.models.tokenizer import has_tokenizer, tokenizer_of
from lorafold.step.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.adapter import Adapter

Opened = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


@dataclass(frozen=True)
class Request:
    """Which adapters become one, by which words of the table, and where it goes.

    No weights, density or rank: each word's own.

    `tasks` are rows by the name of a task, on which all is measured; `examples` those that lorahub
    and mixture learn from; `recipe` and `gates` are the mixture's, `evaluations` how often lorahub
    may try.
    """

    model: str
    adapters: tuple[Path, ...]
    words: tuple[str, ...]
    out: Path
    weights: tuple[float, ...] = ()
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    tasks: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    gates: Gating = "global"
    evaluations: int = 40
    answers: bool = True
    base: str = "auto"
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_other_base: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Composed:
    """One adapter made.

    `weights` is None where no fixed numbers say what was done; the error is a share of the update's
    norm.
    """

    weights: tuple[float, ...] | None
    truncation_error: float
    out: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A request with what it names: the updates are read, the model with the adapters on it
    (adapter1 ...) is opened when it is needed.
    """

    request: Request
    source: ModelSource
    updates: Updates
    opened: Callable[[], Opened]
    console: Console

    @property
    def examples(self) -> Mapping[str, Sequence[Row]]:
        """LorafoldError where there are none."""
        if not self.request.examples:
            raise LorafoldError(
                "lorahub and mixture learn from examples: give --examples, or --data, half of which"
                " is then set apart"
            )
        return self.request.examples

    def targets(self) -> Matches:
        return Matches({site.path: (site.path,) for site in self.updates.sites})

    def save(
        self,
        adapter: Adapter,
        out: Path,
        about: Mapping[str, Any],
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an adapter on the mapped model and take it off again.

        Its record says what it was made of and how the base was held, beside what `record` has.
        LorafoldError where the adapters' bases were held differently and the request does not say
        which to take.
        """
        request = self.request
        paths = request.adapters
        held = base_trained_on(paths) if request.base == "auto" else request.base
        tokenizer = (
            tokenizer_of(self.source, paths, request.trust_remote_code)
            if any(map(has_tokenizer, paths))
            else None
        )
        trained = {"recipe": {"base": held}} if held else {}
        adapter.save(
            out,
            overwrite=request.overwrite,
            tokenizer=tokenizer,
            record={
                **trained,
                **(record or {}),
                "composed": {"adapters": [*map(str, paths)], **about},
            },
            card=training_card(
                request.model, {"recipe": {"adapters": ", ".join(self.updates.names), **about}}, {}
            ),
        )
        adapter.detach()
