"""A spec is a method with its hyperparameters: a frozen dataclass with `build(layer) -> Delta`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, ClassVar, Self

from torch import Tensor

from lorafold.core.delta import Delta, DeltasByPath
from lorafold.core.layer import Layer

# losses(n, rows=None) yields n scalar training losses, each the mean over `rows` rows (None: over
# a batch)
Losses = Callable[..., Iterator[Tensor]]


class Spec(ABC):
    """Abstract: one method with its hyperparameters.

    A method that involves more than one layer implements hooks: attaching calls `join`; a training
    run calls `prepare`, `penalty`, `after_step` and `report`. A spec is frozen, so hooks keep their
    state in the deltas.

    Attributes:
        targets: the modules that the method adapts by default.
        lr: the default learning rate.
        lr_b: the learning rate of its up factors; None means `lr`.
        lr_whole: the learning rate of modules that are fully trained beside it; None means `lr`.
        positions: the number of positions that it adds before the first token of a row.
        asks_losses: `prepare` uses losses of rows, which do not exist in reinforcement learning
            before the first completions are sampled.
        head_alone: it adapts the language model's head only.
        diagnostic: it measures a task, and is not meant for learning it.
        trains_base: it trains the base weights, which therefore can't be quantized.
        modifies_architecture: it adds modules to the forward pass.
        rank_is_dimension: its rank, if it has one, is a dimension of one of its tensors.
    """

    targets: ClassVar[str] = "all-linear"
    lr: ClassVar[float] = 2e-4
    lr_b: ClassVar[float | None] = None
    lr_whole: ClassVar[float | None] = None
    positions: ClassVar[int] = 0
    asks_losses: ClassVar[bool] = False
    head_alone: ClassVar[bool] = False
    diagnostic: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    modifies_architecture: ClassVar[bool] = False
    rank_is_dimension: ClassVar[bool] = True

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Create the spec. Raises UnknownName for an unknown option, with the known ones."""
        known = getattr(cls, "__dataclass_fields__", options)
        if not options.keys() <= known.keys():
            from lorafold.foreign_options import unknown_names

            raise unknown_names(cls.__name__, options, known)
        return super().__new__(cls)

    @abstractmethod
    def build(self, layer: Layer) -> Delta:
        """Make the delta for one layer. Raises LorafoldError if the method can't adapt it."""

    def options(self) -> tuple[str, ...]:
        """The names of the options, including a wrapped spec's."""
        return tuple(field.name for field in fields(self))  # type: ignore[arg-type]

    def at(self, path: str) -> Self:
        """The spec for one module path, with overrides by pattern applied."""
        return self

    def join(self, deltas: DeltasByPath) -> None:
        """Set up state that deltas share; `attach` calls it after all deltas of an adapter, by
        module path, are built.
        """
        return None

    def prepare(self, deltas: DeltasByPath, losses: Losses) -> None:
        """Prepare the deltas for training; called once, before the first step of a run.

        `losses` yields scalars to call `backward()` on; a spec that uses it sets `asks_losses`.
        """
        return None

    def penalty(self, deltas: DeltasByPath) -> Tensor | None:
        """A scalar that is added to the training loss at each step, or None."""
        return None

    def after_step(self, deltas: DeltasByPath, step: int, total: int) -> None:
        """Update the deltas after an optimizer step, while its gradients still exist.

        Args:
            step: the number of the step, from 1.
            total: the number of steps of the run.
        """
        return None

    def report(self, deltas: DeltasByPath) -> str:
        """A text about the method's decisions during the run, such as ranks, which is printed at
        the end of the run; empty for none.
        """
        return ""
