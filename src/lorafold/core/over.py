"""A layer under a delta is a layer again, with the same input, shape and module."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lorafold.core.delta import Delta
from lorafold.core.layer import Layer


class Upon(Layer):
    """Abstract: a layer over another one."""

    under: Layer

    def op(self, x: Tensor, m: Tensor) -> Tensor:
        return self.under.op(x, m)

    def op_once(self, x: Tensor, m: Tensor) -> Tensor:
        return self.under.op_once(x, m)

    def reading_once(self) -> AbstractContextManager[object]:
        return self.under.reading_once()

    def drop(self, x: Tensor, p: float) -> Tensor:
        return self.under.drop(x, p)

    def branch(self, x: Tensor, down: Tensor, up: Tensor, p: float) -> Tensor:
        return self.under.branch(x, down, up, p)

    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        return self.under.scale(y, g, c, onto)

    def each(self, v: Tensor) -> Tensor:
        return self.under.each(v)

    @property
    def matrices(self) -> tuple[int, ...]:
        return self.under.matrices

    @property
    def window(self) -> int:
        return self.under.window

    @property
    def shape(self) -> tuple[int, int]:
        return self.under.shape

    @property
    def takes_ids(self) -> bool:
        return self.under.takes_ids

    @property
    def takes_vectors(self) -> bool:
        return self.under.takes_vectors

    @property
    def has_bias(self) -> bool:
        return self.under.has_bias

    @property
    def module(self) -> nn.Module:
        return self.under.module


class Over(Upon):
    """A layer with one delta attached."""

    def __init__(self, delta: Delta, under: Layer) -> None:
        self.delta, self.under = delta, under

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta(self.under, *args, **kwargs)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.delta.fold(*self.under.dense())

    def original(self) -> Tensor:
        return self.delta.fold(self.under.original(), None)[0]

    def sources(self) -> list[Tensor] | None:
        return None
