"""The input and the result of every method of composing adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorafold.composing.updates import RULES, Updates
from lorafold.data.json_input import Row
from lorafold.errors import LorafoldError
from lorafold.files.model_card import training_card
from lorafold.files.record import BASE, OTHER_BASE, TRAINED_ON
from lorafold.methods.mixture import Gating
from lorafold.models.architecture import auto_class_name
from lorafold.peft.adapter_directory import SavedAdapter, training_storage_of
from lorafold.peft.form import format_of
from lorafold.peft.provenance import BASE_IDENTITY, TrainingStorage
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.adapter import Adapter

Opened = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


@dataclass(frozen=True)
class ComposeRequest:
    """The adapters to compose, the methods and the output. `tasks` are rows for evaluation,
    `examples` rows that lorahub and mixture learn from.
    """

    base: Base
    adapters: tuple[SavedAdapter, ...]
    ways: tuple[str, ...]
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
    completions: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Composed:
    """A composed adapter; `weights` is None for gates by token or layer."""

    weights: tuple[float, ...] | None
    truncation_error: float
    out: str


@dataclass(frozen=True)
class Job:
    """A request with the adapters' updates; `opened()` loads the model with the adapters attached
    as adapter1, adapter2, ...
    """

    request: ComposeRequest
    updates: Updates
    opened: Callable[[], Opened]
    console: Console

    @property
    def examples(self) -> Mapping[str, Sequence[Row]]:
        """The rows that lorahub and mixture learn from, by task."""
        if not self.request.examples:
            raise LorafoldError(
                "--how lorahub and --how mixture need rows to learn from; pass --examples, or"
                " --data, half of which they use"
            )
        return self.request.examples

    def save(
        self,
        adapter: Adapter,
        out: Path,
        about: Mapping[str, Any],
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes and detaches an adapter. Its record lists the adapters that it was made from."""
        request, storage = self.request, self.request.base.storage
        adapters = request.adapters
        made_on = training_storage_of(adapters) if storage == "auto" else TrainingStorage(storage)
        has_tokenizer = any(one.own_tokenizer for one in adapters)
        trained: dict[str, Any] = {TRAINED_ON: made_on and made_on.as_json()}
        if notes := [one.other_base for one in self.updates.adapters if one.other_base]:
            trained |= {OTHER_BASE: "; ".join(notes), BASE_IDENTITY: ""}
            first, *others = (one.own_base.fingerprint for one in adapters)
            if about["how"] in RULES and all(other == first for other in others):
                trained[BASE] = first
        adapter.over = ()
        adapter.save(
            out,
            overwrite=request.overwrite,
            tokenizer=request.base.tokenizer(adapters) if has_tokenizer else None,
            record={
                **trained,
                **(record or {}),
                "composed": {"adapters": [*map(str, adapters)], **about},
            },
            card=training_card(
                request.base.name,
                {"recipe": {"adapters": ", ".join(self.updates.names), **about}},
                {},
                opened_by=auto_class_name(adapter.model),
                in_peft=format_of(adapter.model, adapter.spec, adapter.matches.paths).in_peft,
            ),
        )
        adapter.detach()
