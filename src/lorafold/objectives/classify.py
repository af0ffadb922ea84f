"""Classification of texts. The classification head is trained in full with every method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from lorafold.core.attach import Adapted
from lorafold.core.expert_matrices import module_at
from lorafold.core.spec import Spec
from lorafold.core.targets import match
from lorafold.data.classification import (
    LabelEncoder,
    LabelledExample,
    class_data,
    classes_of,
    preview_labelled,
)
from lorafold.data.examples import WHOLE
from lorafold.data.render import Rendering
from lorafold.data.row_store import Rows
from lorafold.data.tokenizing import Encoded, Encoder
from lorafold.errors import LorafoldError, listed
from lorafold.files.model_card import CLASSES
from lorafold.layers import is_linear
from lorafold.models.classifier import (
    head_paths,
    load_classifier,
    new_heads,
    new_poolers,
    padding_id,
)
from lorafold.objectives.objective import Objective, ObjectiveRequest, Packing
from lorafold.resolve import Base
from lorafold.resolve.base import known_classes
from lorafold.training_step.classification_loss import Classification
from lorafold.training_step.losses import Loss
from lorafold.training_step.shared_prefixes import sharing_prefixes

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classify(Objective):
    packs = False
    classes: tuple[str, ...]

    @classmethod
    def of(cls, request: ObjectiveRequest) -> Self:
        """The objective with the classes of the model or an adapter, or else of the rows."""
        request.refuse_options()
        labels = classes_of(request.rows)
        classes = known_classes(request.base, request.adapters) or labels
        if strange := [name for name in labels if name not in classes]:
            raise LorafoldError(
                f"data: found labels {listed(strange, max_chars=100)}, expected the classes of"
                f" {request.start}: {listed(classes, max_chars=100)}"
            )
        return cls(classes)

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return len(self.classes)

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> None:
        return None  # texts need no chat template

    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return LabelEncoder(tokenizer, self.classes)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Encoded:
        return class_data(table, rows, max_length, self.classes)

    def preview(self, example: LabelledExample, tokenizer: PreTrainedTokenizerBase) -> Text:
        return preview_labelled(example, tokenizer, self.classes)

    def load(
        self, base: Base, tokenizer: PreTrainedTokenizerBase, seed: int = 0
    ) -> PreTrainedModel:
        pad, at = padding_id(tokenizer), (base.loaded_as, base.where)
        return load_classifier(base.source, self.classes, pad, *at, seed=seed)

    def guessing(self, labels: Mapping[str, int]) -> float:
        """The entropy of the class frequencies."""
        shares = [n / sum(labels.values()) for n in labels.values() if n]
        return -sum(share * math.log(share) for share in shares)

    @contextmanager
    def loss(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packing: Packing,
        console: Console,
    ) -> Iterator[Loss]:
        auto = packing == "auto"
        with sharing_prefixes(model, across=True) if auto else nullcontext() as support:
            yield Classification(model, padding_id(tokenizer), support)

    def traced(self, model: Any, inputs: Mapping[str, Tensor], labelled: int) -> Tensor:
        return class_loss(model, inputs)

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        return head_to_save(model, spec, targets)

    def record(self) -> dict[str, Any]:
        return {CLASSES: list(self.classes)}


def head_to_save(model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
    """The paths of the head's modules, which are trained in full. If the method already trains
    them, only the paths of new poolers outside its targets.
    """
    heads = set(head_paths(model))
    adapted = set(match(model, spec.targets if targets is None else targets, is_linear).paths)
    # the method adapts only the head, or trains the base weights including the head
    fresh = {p for p in new_heads(model) if not isinstance(module_at(model, p), Adapted)}
    if adapted and adapted <= fresh and not (spec.head_alone or spec.trains_base):
        raise LorafoldError(
            f"targets: found only the new head, {', '.join(sorted(adapted))}, which is trained in"
            " full anyway; choose other targets, or --method linear-probe to train only the head"
        )
    if adapted <= heads or (spec.trains_base and heads <= adapted):
        return tuple(p for p in new_poolers(model) if p not in adapted)
    return head_paths(model)


def class_loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The classification loss, (), on fake tensors."""
    labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    return Classification(model, 0)(labels, **inputs)
