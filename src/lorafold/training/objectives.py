"""The objectives, one table: what each makes of rows, which model it needs, and which loss it lays
over it.

    objective = OBJECTIVES["classify"](rows, source, adapters)
    data = objective.encode(rows, tokenizer, max_length);  model = objective.load(...)
    with objective.loss(model, tokenizer, packing, console) as loss: ...

A run and its loop go through these steps and know no objective by name.
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
from lorafold.data.examples import Encoded, Example, encode, preview
from lorafold.data.labelled import (
    LabelledData,
    LabelledExample,
    classes_of,
    encode_labelled,
    preview_labelled,
)
from lorafold.data.render import ensure_chat_template
from lorafold.data.rows import Row
from lorafold.errors import LorafoldError
from lorafold.files.card import CLASSES
from lorafold.models.classifier import head_paths, known_classes, load_classifier, padding_id
from lorafold.models.loading import load_model
from lorafold.models.sources import ModelSource
from lorafold.models.storage import Storage
from lorafold.step.documents import packed
from lorafold.step.losses import Classification, Completions, Loss

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Data = Encoded | LabelledData


class Objective(ABC):
    """Abstract: one objective, from rows to a loss."""

    classes: tuple[str, ...] = ()  # of texts, where it tells them apart

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Data:
        """Examples with a report. LorafoldError for rows that are not for this objective."""

    @abstractmethod
    def preview(self, example: Any, tokenizer: PreTrainedTokenizerBase) -> Text: ...

    @abstractmethod
    def load(
        self,
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        storage: Storage,
        device: torch.device,
        seed: int,
        trust_remote_code: bool,
    ) -> PreTrainedModel: ...

    @abstractmethod
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Any:  # a context manager that gives a Loss
        ...

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Give the tokenizer what it lacks for this objective; the notice to print, if something
        was done.
        """
        return None

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        """Modules that must be trained whole beside the method, wherever that is laid."""
        return ()

    def record(self) -> dict[str, Any]:
        """What `lorafold.json` must say for the adapter to be used."""
        return {}


class Sft(Objective):
    """The next token of completions."""

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return ensure_chat_template(tokenizer)

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        return encode(rows, tokenizer, max_length)

    def preview(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
        return preview(example, tokenizer)

    def load(
        self,
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        storage: Storage,
        device: torch.device,
        seed: int,
        trust_remote_code: bool,
    ) -> PreTrainedModel:
        return load_model(source, storage, device, trust_remote_code=trust_remote_code)

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Iterator[Loss]:
        if not packing:
            yield Completions(model, False, tokenizer.pad_token_id or 0)
            return
        with packed(model) as apart:
            if not apart:
                console.print(
                    "packing: this model mixes documents that share a row, so rows are padded"
                    " instead",
                    highlight=False,
                )
            yield Completions(model, apart, tokenizer.pad_token_id or 0)


@dataclass(frozen=True)
class Classify(Objective):
    """The class of a text, by a head over the body; the head is trained whole whatever the
    method.
    """

    classes: tuple[str, ...]

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> LabelledData:
        return encode_labelled(rows, tokenizer, max_length, self.classes)

    def preview(self, example: LabelledExample, tokenizer: PreTrainedTokenizerBase) -> Text:
        return preview_labelled(example, tokenizer, self.classes)

    def load(
        self,
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        storage: Storage,
        device: torch.device,
        seed: int,
        trust_remote_code: bool,
    ) -> PreTrainedModel:
        return load_classifier(
            source,
            self.classes,
            padding_id(tokenizer),
            storage,
            device,
            seed=seed,
            trust_remote_code=trust_remote_code,
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
        # the method is about the head, or trains it in place
        trained = found <= heads or (spec.trains_base and heads <= found)
        return () if trained else head_paths(model)

    def record(self) -> dict[str, Any]:
        return {CLASSES: list(self.classes)}


def classify(rows: Sequence[Row], source: ModelSource, adapters: Sequence[Path]) -> Classify:
    """With the classes that the model or adapter was trained on, where it was, else those of the
    rows.
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
