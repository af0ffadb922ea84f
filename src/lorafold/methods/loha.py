"""LoHa: the elementwise (Hadamard) product of two low-rank matrices.

    y = (W + dW) x + b              dW = alpha / r (A1 B1) * (A2 B2), A (out, r), B (r, in), B2 zero
                                    at start

Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098, prop. 1; LyCORIS: Yeh et al. 2024, arXiv
2309.14859. It reaches rank r^2 with twice the parameters of LoRA at rank r. dW has to be built at
every step, so it costs more time than LoRA; use it where LoRA's rank is too small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafold.core.delta import Dense
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.parts.start import kaiming, zeros
from lorafold.ops.hadamard import hadamard


class LoHaDelta(Dense):
    """w1_a, w2_a (*matrices, out, r), w1_b, w2_b (*matrices, r, in), fp32."""

    def __init__(
        self,
        out: int,
        inn: int,
        rank: int,
        scale: float,
        device: torch.device,
        matrices: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.scale = scale
        shapes = [(*matrices, out, rank), (*matrices, rank, inn)] * 2
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (zeros(shape, device) for shape in shapes)
        for p in (self.w1_a, self.w1_b, self.w2_a):
            kaiming(p)

    def delta(self) -> Tensor:
        return hadamard(self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.scale)


@dataclass(frozen=True)
class LoHa(Spec):
    """LoHa. Raises LorafoldError for a rank below 1.

    Args:
        rank: the rank r of each of the two matrices.
        alpha: the numerator of the scale alpha / r (None: r).
    """

    rank: int = 8
    alpha: float | None = None

    lr: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise LorafoldError(f"LoHa: rank: found {self.rank!r}, expected a whole number from 1")
        object.__setattr__(self, "alpha", float(self.rank if self.alpha is None else self.alpha))

    def build(self, layer: Layer) -> LoHaDelta:
        out, inn = layer.shape
        scale = self.alpha / self.rank  # type: ignore[operator]
        return LoHaDelta(out, inn, self.rank, scale, layer.device, layer.matrices)
