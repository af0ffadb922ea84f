"""The interface of an objective: examples from rows, a model, a loss, and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from lorafold.core.spec import Spec
from lorafold.data.batches import BatchFeed
from lorafold.data.examples import WHOLE
from lorafold.data.json_input import Row
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.row_checks import describe_template
from lorafold.data.row_store import Rows, SourcePart
from lorafold.data.rows import to_rows
from lorafold.data.tokenizing import Encoder, tokenize_rows
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
        """The examples for the loss, in the order of their rows; each has `ids`."""

    @property
    def report(self) -> Any:
        """A report on the rows; `str(report)` is printed."""

    @property
    def parts(self) -> tuple[SourcePart, ...]:
        """The number of rows with examples from each source."""


@dataclass(frozen=True)
class ObjectiveRequest:
    """The request for an objective: its name, the rows, the model and the saved adapters that will
    be loaded on it, the recipe's `beta` (None: the default) and `objective_options`, Python reward
    functions, the recipe's seed, and an environment as a Python object.
    """

    name: str
    rows: Sequence[Row]
    base: Base
    adapters: Sequence[SavedAdapter] = ()
    beta: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rewards: Sequence[Callable[..., Any]] = ()
    seed: int = 0
    environment: Any = ""

    @property
    def start(self) -> str:
        """The adapters or the model that the run starts from, for messages."""
        return ", ".join(map(str, self.adapters)) or self.base.name

    def refuse_options(self) -> None:
        """Raises LorafoldError if any option is given. Objectives without options call this method.
        """
        if self.options or self.beta is not None:
            given = ", ".join(given_options(self.beta, self.options))
            raise LorafoldError(f"{given}: the objective {self.name} has no such option")


class Objective(ABC):
    """Base class of objectives, which turn rows into examples and provide the loss."""

    packs: ClassVar[bool] = True  # whether its examples can be packed
    outputs: int = 0  # the size of the classification head; 0: a language model
    # further directories that the run reads, each with the option that sets it
    reads: Sequence[tuple[str, Path]] = ()
    # inputs of the run besides recipe, rows and models, as JSON
    identity: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, request: ObjectiveRequest) -> Self:
        """The objective of a run. Raises LorafoldError for unknown options, and for unsuitable
        rows, models or adapters.
        """
        request.refuse_options()
        return cls()

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        """The options by name, with their defaults."""
        return {}

    @abstractmethod
    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        """The encoder that tokenizes the rows.

        Args:
            tokenizer: the tokenizer, after `set_up`.
            rendering: the parts of a conversation that are trained.
        """

    @abstractmethod
    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Data:
        """The examples of a table from the encoder, with a report.

        Args:
            rows: the rows that the table was encoded from.
            max_length: longer examples are truncated to this many tokens, or rejected.

        Raises LorafoldError if nothing is left to train on.
        """

    def examples(self, step: int, planned: Sequence[Any], loss: Any) -> Sequence[Any]:
        """The examples of a step, the same in every process. By default, these are the planned
        examples; objectives whose examples depend on the current weights override this method.

        Args:
            step: the number of the step, from 0.
            planned: the examples of this step's rows.
            loss: the loss from `loss`, with the model.
        """
        return planned

    def updates(self, examples: Sequence[Any], loss: Any) -> Iterator[Sequence[Any]]:
        """Yields the examples of each weight update in a step; by default, one update uses all
        examples.
        """
        yield examples

    def trained(self, example: Any) -> Any:
        """The part of an example that is computed with gradients; by default, all of it."""
        return example

    @abstractmethod
    def preview(self, example: Any, tokenizer: PreTrainedTokenizerBase) -> Text:
        """An example as the model sees it, with the trained tokens marked."""

    def load(
        self, base: Base, tokenizer: PreTrainedTokenizerBase, seed: int = 0
    ) -> PreTrainedModel:
        """The model without adapters, with the head that this objective needs.

        Args:
            tokenizer: the tokenizer, which defines the padding token.
            seed: the seed for the initialization of new parts.
        """
        return base.load()

    @abstractmethod
    def loss(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packing: Packing,
        console: Console,
    ) -> Any:
        """A context manager that yields the `Loss` of this model.

        Args:
            model: the model from `load`, with adapters attached.
            tokenizer: the tokenizer, which defines the padding token.
            packing: pack the examples of a micro-batch, if the model supports it; auto: also share
                prefixes, if that saves tokens.
            console: prints notices, for example that the model does not support packing.
        """

    def traced(self, model: Any, inputs: Mapping[str, Tensor], labelled: int) -> Tensor:
        """The loss (), on fake tensors, for the memory estimate of a step; by default the
        next-token loss.

        Args:
            model: the model from `load`, on fake tensors.
            inputs: input_ids with positions (1, T), or with a mask (B, T).
            labelled: the number of labelled tokens; each of B padded rows gets labelled / B of
                them, rounded up.
        """
        return next_token_loss(model, inputs, labelled)

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Adds missing parts to the tokenizer, such as a chat template. Returns a notice or None.
        """
        plain = ensure_chat_template(tokenizer)
        return plain or f"chat template: {'; '.join(describe_template(tokenizer).lines)}"

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        """The paths of the modules that must be trained in full with every method.

        Args:
            model: the model from `load`.
            targets: the targets of the recipe (None: the method's default).
        """
        return ()

    def record(self) -> dict[str, Any]:
        """Fields of `lorafold.json` that are needed to use the adapter, or that describe its
        training data.
        """
        return {}

    def refer(
        self, loss: Any, feed: BatchFeed, held_out: Any, below: Sequence[str], console: Console,
        layout: Replicated,
    ) -> tuple[BatchFeed, Any]:
        """The same examples, with log-probabilities of the untrained model if the objective needs
        them.

        Args:
            loss: the loss from `loss`.
            held_out: the `Data` for evaluation, or None.
            below: identities of the untrained model: its files, dtype and device.
            layout: the placement of the model's tensors on processes.
        """
        return feed, held_out

    def guessing(self, labels: Mapping[str, int]) -> float | None:
        """The mean loss in nats of a model that only guesses; a run warns if its loss is not lower.
        None stands for the untrained model's loss on the first step's rows, and inf for no warning.

        Args:
            labels: the number of training rows of each label, if any.
        """
        return None

    def measure(self, loss: Any, held_out: Any) -> Measured:
        """The metrics of held-out examples."""
        return Measured(held_out_loss(loss, held_out.examples))

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        max_length: int,
    ) -> Evaluation | RewardEvaluation:
        """The metrics by which methods are compared on held-out rows: the loss and exact match.

        Args:
            model: the model from `load`, with or without adapters.
            tokenizer: the tokenizer, after `set_up`.
            max_length: longer rows are truncated to this many tokens, or rejected.
        """
        return evaluate(model, tokenizer, rows, max_length)


class OnPolicy(Objective):
    """Base class of objectives that sample completions from the model in each step.

    The model can't be sharded, because the sampling engine runs its own forward passes. Held-out
    rows are also evaluated before the first step.
    """

    @abstractmethod
    def draws(self, feed: BatchFeed, held_out: Any) -> RolloutSize:
        """The number and length of completions that are sampled at a time, for the memory estimate.

        Args:
            held_out: the `Data` for evaluation, or None.
        """


def given_options(beta: float | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a recipe sets for an objective, including `beta`."""
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
    """Tokenizes rows, and prints a report if there is a console. Longer examples are truncated to
    `max_length` tokens, or rejected.
    """
    encoder = objective.encoder(tokenizer, rendering)
    rows = to_rows(rows, encoder.row_content)
    data = objective.data(tokenize_rows(rows, encoder, console), rows, max_length)
    if console is not None:
        lines = str(data.report).splitlines()
        is_usual = called == "held out" and len(lines) == 1
        print_lines(console, f"{called}: {'; '.join(lines)}", detail=is_usual)
    return data
