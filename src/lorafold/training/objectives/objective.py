"""What a run asks of an objective: examples of rows, a model, a loss, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorafold.core.spec import Spec
from lorafold.data.examples import WHOLE, Encoded
from lorafold.data.feed import Feed
from lorafold.data.labelled import LabelledData
from lorafold.data.preferred import PreferredData
from lorafold.data.render import Rendering
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoder
from lorafold.errors import LorafoldError
from lorafold.evaluation import Measured, held_out_loss
from lorafold.models.loading import load_model
from lorafold.models.sources import ModelSource
from lorafold.models.storage import Storage
from lorafold.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Data = Encoded | LabelledData | PreferredData


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

    packs: ClassVar[bool] = True  # where the recipe asks for it and the model allows it

    @property
    def outputs(self) -> int:
        """The outputs of the head over a text; 0 for that of a language model."""
        return 0

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

    def trained(self, example: Any) -> Any:
        """What of an example a step computes with gradients."""
        return example

    @abstractmethod
    def preview(self, example: Any, tokenizer: PreTrainedTokenizerBase) -> Text:
        """An example as the model sees it, with the tokens that count in the loss marked."""

    def load(self, request: ModelRequest) -> PreTrainedModel:
        """The model with the head that this objective needs, and without adapters: a language
        model, unless it needs another head.
        """
        return load_model(
            request.source,
            request.storage,
            request.device,
            trust_remote_code=request.trust_remote_code,
        )

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

    def refer(
        self,
        loss: Any,
        feed: Feed,
        held_out: Data | None,
        below: Sequence[str],
        console: Console,
    ) -> tuple[Feed, Data | None]:
        """The same examples with what the objective has to know of them under the model before
        anything is trained.

        Args:
            loss: As `loss` yields it.
            feed: The examples to train on.
            held_out: Those to measure on.
            below: What the model before anything is trained depends on besides its tensors, as
                identities.
            console: For progress.
        """
        return feed, held_out

    def measure(self, loss: Any, held_out: Any) -> Measured:
        """The figures of held-out examples."""
        return Measured(held_out_loss(loss, held_out.examples))


def no_options(recipe: Recipe) -> None:
    """Raise LorafoldError if the recipe has options of an objective that has none."""
    given = [] if recipe.beta is None else ["beta"]
    if given := [*given, *recipe.objective_options]:
        raise LorafoldError(
            f"{', '.join(given)}: the objective {recipe.objective} has no such option"
        )
