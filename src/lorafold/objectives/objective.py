"""What a run asks of an objective: examples of rows, a model, a loss, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from lorafold.core.spec import Spec
from lorafold.data.batches import BatchFeed
from lorafold.data.checks import describe_template
from lorafold.data.examples import WHOLE
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.row_store import Rows, SourcePart
from lorafold.data.rows import as_checked
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoder, tokenized
from lorafold.errors import LorafoldError
from lorafold.evaluation import Evaluation, Measured, RewardEvaluation, evaluate, held_out_loss
from lorafold.evaluation.rollouts import RolloutSize
from lorafold.files.terminal import print_lines
from lorafold.objectives import Declared
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.losses import next_token_loss

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Packing = bool | Literal["auto"]


class Data(Protocol):
    """Tokenized rows."""

    @property
    def examples(self) -> Sequence[Any]:
        """The examples that a loss takes, in the order of their rows; each has `ids`."""

    @property
    def report(self) -> Any:
        """A report on the rows; `str` gives it as lines of text."""

    @property
    def parts(self) -> tuple[SourcePart, ...]:
        """How many rows with examples are from each source."""


@dataclass(frozen=True)
class ObjectiveRequest:
    """The request for an objective: its name, the rows, the model and the saved adapters that will
    be loaded on it, the recipe's `beta` (None: the default) and `objective_options`, reward
    functions in Python, and the recipe's seed.
    """

    name: str
    rows: Sequence[Row]
    base: Base
    adapters: Sequence[SavedAdapter] = ()
    beta: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rewards: Sequence[Callable[..., Any]] = ()
    seed: int = 0

    @property
    def start(self) -> str:
        """The name of the start of the run in messages: the adapters, or the model."""
        return ", ".join(map(str, self.adapters)) or self.base.name

    def refuse_options(self) -> None:
        """Raise LorafoldError if options are given: for an objective that has none."""
        if self.options or self.beta is not None:
            given = ", ".join(given_options(self.beta, self.options))
            raise LorafoldError(f"{given}: the objective {self.name} has no such option")


class Objective(ABC):
    """Abstract: one objective, from rows to a loss."""

    packs: ClassVar[bool] = True  # where the recipe asks for it and the model allows it
    outputs: int = 0  # of the head over a text; 0 for that of a language model
    # directories besides the model and the run's adapters, each after the option that names it
    reads: Sequence[tuple[str, Path]] = ()
    # what a run depends on that neither its recipe nor its rows and models are, as JSON
    identity: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, request: ObjectiveRequest) -> Self:
        """The objective of a run. Raises LorafoldError for options that it does not have, and for
        rows, a model or adapters that do not suit it.
        """
        request.refuse_options()
        return cls()

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        """The options by name, with their defaults."""
        return {}

    @abstractmethod
    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        """What makes tables of tokens of what the formats of rows provide.

        Args:
            tokenizer: After `set_up`.
            rendering: What of a conversation is trained on.
        """

    @abstractmethod
    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Data:
        """The examples of a table that the encoder made, with a report.

        Args:
            rows: What it was made of.
            max_length: Longer examples are cut to this many tokens.

        Raises LorafoldError for rows of which nothing is left to train on.
        """

    def examples(self, step: int, planned: Sequence[Any], loss: Any) -> Sequence[Any]:
        """The examples that a step computes: the planned ones, unless they depend on the weights,
        which are those of the steps before. In every process they are the same.

        Args:
            step: The number of the step, from 0.
            planned: Examples of the rows that the run has for this step.
            loss: As `loss` yields it, with the model.
        """
        return planned

    def updates(self, examples: Sequence[Any], loss: Any) -> Iterator[Sequence[Any]]:
        """The examples of each update of the weights in a step: all, once."""
        yield examples

    def trained(self, example: Any) -> Any:
        """The part of an example that a step computes with gradients."""
        return example

    @abstractmethod
    def preview(self, example: Any, tokenizer: PreTrainedTokenizerBase) -> Text:
        """An example as the model sees it, with the tokens that count in the loss marked."""

    def load(
        self, base: Base, tokenizer: PreTrainedTokenizerBase, seed: int = 0
    ) -> PreTrainedModel:
        """The model with the head that this objective needs, and without adapters: a language
        model, unless it needs another head.

        Args:
            tokenizer: Names the token that pads.
            seed: Draws the parts that are new in it.
        """
        return base.load()

    @abstractmethod
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: Packing,
        console: Console,
    ) -> Any:
        """A context manager that yields the `Loss` of this model.

        Args:
            model: As `load` gives it, with adapters attached.
            tokenizer: Names the token that pads.
            packing: Lay the examples of a micro-batch end to end, where the model allows it; auto:
                and compute once what several begin with, where that pays.
            console: For a notice if it does not.
        """

    def traced(self, model: Any, inputs: Mapping[str, Tensor], labelled: int) -> Tensor:
        """The loss (), on tensors without values, from which the memory of a step is estimated:
        that of the next token, unless the step keeps more.

        Args:
            model: As `load` gives it, without values.
            inputs: input_ids with positions (1, T), or with a mask (B, T).
            labelled: The tokens that the loss counts, divided evenly among padded rows.
        """
        return next_token_loss(model, inputs, labelled)

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Add what the tokenizer lacks for this objective, such as a chat template. Returns a
        notice of what was added, or of how the template renders.
        """
        plain = ensure_chat_template(tokenizer)
        return plain or f"chat template: {'; '.join(describe_template(tokenizer).lines)}"

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        """Paths of the modules that must be trained whole, whatever the method adapts.

        Args:
            model: As `load` gives it.
            targets: The recipe's; None takes the method's own.
        """
        return ()

    def record(self) -> dict[str, Any]:
        """Fields of `lorafold.json` without which the adapter could not be used, or that say what
        it learned from.
        """
        return {}

    def refer(
        self, loss: Any, feed: BatchFeed, held_out: Any, below: Sequence[str], console: Console,
        layout: Replicated,
    ) -> tuple[BatchFeed, Any]:
        """The same examples with what the objective has to know of them under the untrained model.

        Args:
            loss: As `loss` yields it.
            held_out: The `Data` to measure on, or None.
            below: The identities of what that model depends on besides its tensors.
            layout: Of the model.
        """
        return feed, held_out

    def guessing(self, labels: Mapping[str, int]) -> float | None:
        """The mean loss in nats of a model that only guesses, which a run has to get below. None:
        that of the model before the first step, on the rows of that step; inf: none is too high.

        Args:
            labels: The training rows of each label, if they have labels.
        """
        return None

    def measure(self, loss: Any, held_out: Any) -> Measured:
        """The figures of held-out examples."""
        return Measured(held_out_loss(loss, held_out.examples))

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        max_length: int,
    ) -> Evaluation | RewardEvaluation:
        """What methods are compared by, of held-out rows: the loss and exact match.

        Args:
            model: As `load` gives it, with adapters or without.
            tokenizer: After `set_up`.
            max_length: Longer rows are cut to this many tokens, or refused.
        """
        return evaluate(model, tokenizer, rows, max_length)


class OnPolicy(Objective):
    """Abstract: an objective that learns from completions which the model generates in each step.

    Nothing is known of them before the step. The engine that samples them has passes of its own, so
    a model can't be divided among processes. Held-out rows are measured before the first step too.
    """

    @abstractmethod
    def draws(self, feed: BatchFeed, held_out: Any) -> RolloutSize:
        """The completions that steps draw at a time, for which an engine is beside the model.

        Args:
            held_out: The `Data` to measure on, or None.
        """


def given_options(beta: float | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an objective that a recipe gives, `beta` among them."""
    first = {} if beta is None else {"beta": beta}
    return {**first, **options, **first}


def examples_of(
    objective: Objective,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    console: Console | None = None,
    rendering: Rendering = WHOLE,
    called: str = "data",
) -> Data:
    """Tokenized rows, whose report is printed if there is a console. Longer examples are cut to
    `max_length` tokens.
    """
    encoder = objective.encoder(tokenizer, rendering)
    rows = as_checked(rows, encoder.takes)
    data = objective.data(tokenized(rows, encoder, console), rows, max_length)
    if console is not None:
        print_lines(console, f"{called}: {data.report}")
    return data
