"""The objectives, in one table: how each turns rows into examples, which model it loads, and which
loss it computes with the model.

    objective = OBJECTIVES["classify"](rows, source, adapters)
    data = objective.encode(rows, tokenizer, max_length);  model = objective.load(request)
    with objective.loss(model, tokenizer, packing, console) as loss: ...

A run and its loop call these methods and name no objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.bases import is_linear
from lorafold.core.spec import Spec
from lorafold.core.targets import match
from lorafold.data.completions import Completions
from lorafold.data.examples import WHOLE, Encoded, Example, encode, preview
from lorafold.data.labelled import (
    LabelledData,
    LabelledExample,
    Labels,
    classes_of,
    encode_labelled,
    preview_labelled,
)
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoder
from lorafold.errors import LorafoldError
from lorafold.files.card import CLASSES
from lorafold.models.classifier import head_paths, known_classes, load_classifier, padding_id
from lorafold.models.loading import load_model
from lorafold.models.sources import ModelSource
from lorafold.models.storage import Storage
from lorafold.step.documents import packed
from lorafold.step.losses import Classification, Loss
from lorafold.step.losses import Completions as CompletionLoss

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Data = Encoded | LabelledData


@dataclass(frozen=True)
class ModelRequest:
    """The model that an objective is asked to load. `seed` draws the parts that are new in it."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    storage: Storage
    device: torch.device
    seed: int
    trust_remote_code: bool


class Objective(ABC):
    """Abstract: one objective, from rows to a loss."""

    classes: tuple[str, ...] = ()  # the labels of a classifier


    @abstractmethod
    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        console: Console,
        rendering: Rendering = WHOLE,
    ) -> Data:
        """Tokenized rows, with a report.

        Args:
            rows: Rows of the user's data.
            tokenizer: After `set_up`.
            max_length: Longer examples are cut to this many tokens.
            console: For progress.
            rendering: What of a conversation is trained on.

        Raises LorafoldError for rows that this objective can't use.
        """

    @abstractmethod
    def encoder(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE
    ) -> Encoder:
        """What makes examples of rows, of which not all are at hand."""

    @abstractmethod
    def preview(self, example: Any, tokenizer: PreTrainedTokenizerBase) -> Text:
        """An example as the model sees it, with the tokens that count in the loss marked."""

    @abstractmethod
    def load(self, request: ModelRequest) -> PreTrainedModel:
        """The model with the head that this objective needs, and without adapters."""

    @abstractmethod
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Any:
        """A context manager that yields the `Loss` of this model.

        Args:
            model: As `load` gives it, with adapters attached.
            tokenizer: Names the token that pads.
            packing: Lay the examples of a micro-batch end to end, where the model allows it.
            console: For a notice if it does not.
        """

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Add what the tokenizer lacks for this objective. Returns a notice of what was added."""
        return None

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        """Paths of the modules that must be trained whole, whatever the method adapts.

        Args:
            model: As `load` gives it.
            spec: The method.
            targets: The recipe's; None takes the method's own.
        """
        return ()

    def record(self) -> dict[str, Any]:
        """Fields of `lorafold.json` without which the adapter could not be used."""
        return {}


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
    ) -> Iterator[Loss]:
        if not packing:
            yield CompletionLoss(model, False, tokenizer.pad_token_id or 0)
            return
        with packed(model) as apart:
            if not apart:
                console.print(
                    "packing: this model lets documents of one sequence attend to each other, so"
                    " examples are padded instead",
                    highlight=False,
                )
            yield CompletionLoss(model, apart, tokenizer.pad_token_id or 0)


@dataclass(frozen=True)
class Classify(Objective):
    """The class of a text, by a head on the decoder; every method trains the whole head too."""

    classes: tuple[str, ...]

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        console: Console,
        rendering: Rendering = WHOLE,
    ) -> LabelledData:
        return encode_labelled(rows, tokenizer, max_length, self.classes, console)

    def encoder(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE
    ) -> Encoder:
        return Labels(tokenizer, self.classes)

    def preview(self, example: LabelledExample, tokenizer: PreTrainedTokenizerBase) -> Text:
        return preview_labelled(example, tokenizer, self.classes)

    def load(self, request: ModelRequest) -> PreTrainedModel:
        return load_classifier(
            request.source,
            self.classes,
            padding_id(request.tokenizer),
            request.storage,
            request.device,
            seed=request.seed,
            trust_remote_code=request.trust_remote_code,
        )

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Iterator[Loss]:
        yield Classification(model, padding_id(tokenizer))

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        heads = set(head_paths(model))
        found = set(match(model, spec.targets if targets is None else targets, is_linear).paths)
        # the method adapts nothing but the head, or trains the base's own weights, the head's too
        trained = found <= heads or (spec.trains_base and heads <= found)
        return () if trained else head_paths(model)

    def record(self) -> dict[str, Any]:
        return {CLASSES: list(self.classes)}


def classify(rows: Sequence[Row], source: ModelSource, adapters: Sequence[Path]) -> Classify:
    """The classifier for the classes that the model or an adapter knows, else those of the rows.

    Args:
        rows: Texts with labels.
        source: The model.
        adapters: Saved adapters that will be loaded on it.

    Raises LorafoldError for labels that are not among the known classes.
    """
    found = classes_of(rows)
    classes = known_classes(source, adapters) or found
    if strange := [name for name in found if name not in classes]:
        owner = ", ".join(map(str, adapters)) or source.name
        raise LorafoldError(
            f"data: found labels {', '.join(strange)}, expected the classes of {owner}:"
            f" {', '.join(classes)}"
        )
    return Classify(classes)


OBJECTIVES: dict[str, Callable[[Sequence[Row], ModelSource, Sequence[Path]], Objective]] = {
    "sft": lambda rows, source, adapters: Sft(),
    "classify": classify,
}
