"""A spec says what to lay down: a frozen dataclass with the method's hyper-parameters and
`build(layer) -> Delta`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import ClassVar, Self

from torch import Tensor

from lorafold.core.delta import Delta
from lorafold.core.layer import Layer

# losses(n, rows=None): n training losses, each a mean over `rows` rows or else a batch
Losses = Callable[..., Iterator[Tensor]]


class Spec(ABC):
    """Abstract: one method with its hyper-parameters.

    What a method needs beyond one layer goes through the hooks that attach and a run call on any
    spec: `join`, `prepare`, `after_step` and `report`; its `Delta`s may add a `penalty` to the
    loss. A spec is frozen, so what they keep lives in the deltas.

    `targets`, `lr` and `lr_b` are the method's own defaults: where it is laid, the learning rate of
    its parameters, and that of its up factors (None: the same). `objectives`: those that it is for.
    `diagnostic`: it measures a task and is not there to learn it. `trains_base`: it trains the
    base's own weights, which then can't be quantized. `modifies_architecture`: it adds modules to
    the forward path.
    """

    targets: ClassVar[str] = "all-linear"
    lr: ClassVar[float] = 2e-4
    lr_b: ClassVar[float | None] = None
    objectives: ClassVar[tuple[str, ...]] = ("sft", "classify")
    diagnostic: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    modifies_architecture: ClassVar[bool] = False

    @abstractmethod
    def build(self, layer: Layer) -> Delta: ...

    def options(self) -> tuple[str, ...]:
        """The names of its options, with those of a spec that it lies over."""
        return tuple(field.name for field in fields(self))  # type: ignore[arg-type]

    def at(self, path: str) -> Self:
        """The spec as it holds at one module path: per-pattern overrides applied."""
        return self

    def join(self, deltas: Mapping[str, Delta]) -> None:
        """Called by `attach` once all of the adapter's deltas (by module path) are built: what one
        layer can't make alone.
        """
        return None

    def prepare(self, deltas: Mapping[str, Delta], losses: Losses) -> None:
        """Called once before the first step of a run.

        What `losses` yields are scalars to call backward() on.
        """
        return None

    def after_step(self, deltas: Mapping[str, Delta], step: int, total: int) -> None:
        """Called after optimizer step `step` (from 1) of `total`, with the step's gradients still
        in place.
        """
        return None

    def report(self, deltas: Mapping[str, Delta]) -> str:
        """Called at the end of a run: what it decided about the deltas, to be printed; empty if
        there was nothing to decide.
        """
        return ""
