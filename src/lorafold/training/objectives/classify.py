"""Classification: the class of a text, by a head on the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorafold.bases import is_linear
from lorafold.core.spec import Spec
from lorafold.core.targets import match
from lorafold.data.examples import WHOLE
from lorafold.data.labelled import (
    LabelledData,
    LabelledExample,
    Labels,
    classes_of,
    encode_labelled,
    preview_labelled,
)
from lorafold.data.render import Rendering
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoder
from lorafold.errors import LorafoldError
from lorafold.files.card import CLASSES
from lorafold.models.classifier import head_paths, known_classes, load_classifier, padding_id
from lorafold.models.sources import ModelSource
from lorafold.recipe.recipe import Recipe
from lorafold.step.losses import Classification, Loss
from lorafold.training.objectives.objective import ModelRequest, Objective, no_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classify(Objective):
    """The class of a text, by a head on the decoder; every method trains the whole head too."""

    packs: ClassVar[bool] = False
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        return len(self.classes)

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
        return head_to_save(model, spec, targets)

    def record(self) -> dict[str, Any]:
        return {CLASSES: list(self.classes)}


def head_to_save(model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
    """The paths of the head's modules, to be trained whole; none where the method does so already.

    Args:
        model: A classifier without adapters.
        spec: The method.
        targets: The recipe's; None takes the method's own.
    """
    heads = set(head_paths(model))
    found = set(match(model, spec.targets if targets is None else targets, is_linear).paths)
    # the method adapts nothing but the head, or trains the base's own weights, the head's too
    trained = found <= heads or (spec.trains_base and heads <= found)
    return () if trained else head_paths(model)


def classify(
    recipe: Recipe, rows: Sequence[Row], source: ModelSource, adapters: Sequence[Path]
) -> Classify:
    """The classifier for the classes that the model or an adapter knows, else those of the rows.

    Args:
        recipe: Has no option of this objective.
        rows: Texts with labels.
        source: The model.
        adapters: Saved adapters that will be loaded on it.

    Raises LorafoldError for labels that are not among the known classes.
    """
    no_options(recipe)
    found = classes_of(rows)
    classes = known_classes(source, adapters) or found
    if strange := [name for name in found if name not in classes]:
        owner = ", ".join(map(str, adapters)) or source.name
        raise LorafoldError(
            f"data: found labels {', '.join(strange)}, expected the classes of {owner}:"
            f" {', '.join(classes)}"
        )
    return Classify(classes)
