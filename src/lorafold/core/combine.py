"""Combinators: deltas made of deltas. They never know which methods they combine.

    Stack(d1, d2)       d2 over d1 at one layer, under one name: W -> fold2(fold1(W))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lorafold.core.delta import Delta
from lorafold.core.layer import Layer, Over


class Stack(Delta):
    """Several deltas at one layer that belong to one adapter (LoRA and a trained bias), the first one lowest."""

    def __init__(self, deltas: Iterable[Delta]) -> None:
        super().__init__()
        self.deltas = nn.ModuleList(deltas)

    def parts(self) -> Iterable[Delta]:
        return (part for delta in self.deltas for part in delta.parts())  # type: ignore[operator, union-attr]

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        for delta in self.deltas:
            layer = Over(delta, layer)  # type: ignore[arg-type]
        return layer(*args, **kwargs)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for delta in self.deltas:
            w, b = delta.fold(w, b)  # type: ignore[operator]
        return w, b
