"""A delta is middleware for one layer, and the same change seen in weight space.

    delta(layer, x)     what the adapted layer computes; layer(x) runs whatever lies beneath
    delta.fold(w, b)    W (out, in), b (out,) | None  ->  the changed W, b, in the wider of the two dtypes

The law: folding then calling equals calling. Where a change has no weight-space form, `fold` raises `NotMergeable`.
Every class here is abstract; every method is a final subclass of one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafold.core.layer import Layer
from lorafold.errors import NotMergeable


class Delta(nn.Module, ABC):
    """Abstract: a trainable change of one layer. Parameters are fp32 and live on the layer's device."""

    up_names: ClassVar[tuple[str, ...]] = ()  # parameters that take the up factor's learning rate (LoRA+)

    @abstractmethod
    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]: ...

    def parts(self) -> Iterable[Delta]:
        """The deltas this one is made of, in the order they apply: itself, unless it is a combinator."""
        return (self,)

    def penalty(self) -> Tensor | None:
        """A term the training loss gains at each step, or None."""
        return None


class Opaque(Delta):
    """Abstract: a change with no weight-space form."""

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable(f"{type(self).__name__} has no form in weight space, so it can't be merged")


class Additive(Delta):
    """Abstract: W + dW."""

    @abstractmethod
    def delta(self) -> Tensor:  # (out, in), scale included
        ...

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.delta(), b


class Dense(Additive):
    """Abstract: dW must be built anyway, so it is added to W and the layer is one matmul."""

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        w, b = self.fold(*layer.dense())
        y = layer.op(x, w)
        y = y if onto is None else y + onto
        return y if b is None else y + b


class LowRank(Additive):
    """Abstract: a method that is its two factors, nothing more. Dropout lies on the branch only."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:  # up (out, r), down (r, in), scale included
        ...

    def delta(self) -> Tensor:  # (out, in)
        up, down = self.factors()
        return up @ down

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        up, down = self.factors()
        return layer.low_rank(x, down, up, self.dropout if self.training else 0.0, onto)
