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
        lr_b: the default learning rate of the up factors; None means `lr`.
        lr_whole: the default learning rate of modules that are trained in full next to the adapter;
            None means `lr`.
        positions: the number of virtual tokens that the method adds before a row.
        asks_losses: whether `prepare` uses losses of rows, which reinforcement learning has only
            after the first completions are sampled.
        head_alone: whether the method adapts only the LM head.
        diagnostic: whether the method measures a task, and is not meant for learning it.
        trains_base: whether the method trains the base weights, which therefore can't be quantized.
        modifies_architecture: whether the method adds modules to the forward pass.
        rank_is_dimension: whether the rank, if there is one, is a dimension of one of the tensors.
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
        """Creates the spec. Raises UnknownName, which lists the known options, for an unknown one.
        """
        known = getattr(cls, "__dataclass_fields__", options)
        if not options.keys() <= known.keys():
            from lorafold.foreign_options import unknown_names

            raise unknown_names(cls.__name__, options, known)
        return super().__new__(cls)

    @abstractmethod
    def build(self, layer: Layer) -> Delta:
        """Builds the delta for one layer. Raises LorafoldError if the method can't adapt it."""

    def options(self) -> tuple[str, ...]:
        """Returns the names of the options, including those of a wrapped spec."""
        return tuple(field.name for field in fields(self))  # type: ignore[arg-type]

    def at(self, path: str) -> Self:
        """Returns the spec for one module path, with overrides by pattern applied."""
        return self

    def join(self, deltas: DeltasByPath) -> None:
        """Sets up state that deltas share. `attach` calls it with all deltas of an adapter, by
        module path, after they are built.
        """
        return None

    def prepare(self, deltas: DeltasByPath, losses: Losses) -> None:
        """Prepares the deltas for training; called once, before the first step of a run.

        `losses` yields scalars to call `backward()` on; a spec that uses it sets `asks_losses`.
        """
        return None

    def penalty(self, deltas: DeltasByPath) -> Tensor | None:
        """Returns a scalar that is added to the training loss at each step, or None."""
        return None

    def after_step(self, deltas: DeltasByPath, step: int, total: int) -> None:
        """Updates the deltas after an optimizer step, while its gradients still exist.

        Args:
            step: the number of the step, from 1.
            total: the number of steps of the run.
        """
        return None

    def report(self, deltas: DeltasByPath) -> str:
        """Returns a text about the method's decisions during the run, such as ranks, which is
        printed at the end of the run; empty for none.
        """
        return ""
