"""What an adapter is folded into, where its base was packed while it was trained. q packs W and
unpacks it again.

    original        W + dW              the weights from before the packing: not what the adapter
                                        was trained on
    dequantized     q(W) + dW           what it was trained on, in 16 bits
    nf4, int8       q(W + dW)           packed anew: small, at the price of another rounding

What is packed anew starts from the original weights. On those that were packed before, which lie on
the grid of codes already, a change under half a step would be rounded away altogether (measured: an
adapter that answers 99% right answers nothing right). An adapter whose base was not packed is
folded into the original, which may be packed afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.bases import layer_class, layer_of
from lorafold.bases.bitsandbytes import PACKERS
from lorafold.core.attach import lay, selection_of
from lorafold.core.delta import Delta
from lorafold.core.layer import Layer, add
from lorafold.errors import LorafoldError
from lorafold.files.record import base_trained_on
from lorafold.models.quantizing import QUANTIZATIONS, packable

PACKING = "packing"  # the name under which a round trip lies beneath the adapters
TARGETS = ("original", "dequantized", *QUANTIZATIONS)


@dataclass(frozen=True)
class Into:
    """`target`, a word of TARGETS, and how the base was packed in training (None: it was not)."""

    target: str
    trained_on: str | None

    @property
    def packing(self) -> str | None:
        """The round trip that W makes before anything is added to it."""
        return self.trained_on if self.target == "dequantized" else None

    @property
    def repacked(self) -> str | None:
        """How the result is packed."""
        return self.target if self.target in QUANTIZATIONS else None

    def __str__(self) -> str:
        base = (
            f"the {self.trained_on} base that it was trained on, dequantized"
            if self.packing
            else "the original weights"
        )
        other = (
            f" (it was trained on {self.trained_on})"
            if self.trained_on and not self.packing
            else ""
        )
        return base + other + f", and packed as {self.repacked}" * bool(self.repacked)


def choose_into(asked: str | None, adapters: Sequence[str | Path], base: str = "auto") -> Into:
    """The target that was asked for, or what the adapters were trained on.

    `base`: how it was held then (auto: as their records say).

    LorafoldError for an unknown word, for adapters that were trained on different bases, and for a
    dequantized base that never was one.
    """
    word = (base_trained_on(adapters) or "auto") if base == "auto" else base
    trained_on = word if word in QUANTIZATIONS else None
    if asked is not None and asked not in TARGETS:
        raise LorafoldError(f"into {asked}: unknown; expected {', '.join(TARGETS)}")
    if asked == "dequantized" and trained_on is None:
        known = (
            "no packed base is on their record"
            if word == "auto"
            else f"they were trained on {word}"
        )
        raise LorafoldError(
            f"into dequantized: {known}; expected original, or --base to say how it was packed"
        )
    return Into(asked or ("dequantized" if trained_on else "original"), trained_on)


class RoundTrip(Delta):
    """A packing as a change in weight space: W -> q(W), in fp32 or wider."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Any:
        w, b = self.fold(*layer.dense())
        return add(add(layer.op(x, w), onto), b)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(w.dtype, torch.float32)
        return (
            torch.empty_like(w) if w.is_meta else layer_of(PACKERS[self.kind](w)).dense()[0]
        ).to(wide), b


def lay_packing(model: nn.Module, kind: str) -> None:
    """Lay the round trip on every linear that training had packed. It is no adapter, and not
    live.
    """
    selection = selection_of(model)
    for path in packable(model):  # type: ignore[arg-type]
        module = model.get_submodule(path)
        lay(module, layer_class(module), PACKING, RoundTrip(kind), selection)
