"""LoHa: the elementwise (Hadamard) product of two low-rank matrices.

    y = (W + dW) x + b              dW = alpha / r (A1 B1) * (A2 B2), A (out, r), B (r, in), B2 zero
                                    at start
    dW = U V                        U (out, r^2) the products of a column of A1 and one of A2, V
                                    (r^2, in) the products of a row of B1 and one of B2

Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098, prop. 1; LyCORIS: Yeh et al. 2024, arXiv
2309.14859. LoHa reaches rank r^2 with twice the parameters of LoRA at rank r, but takes more time.
Use it if LoRA's rank is too small. At small ranks, LoHa runs as the low-rank update U V; at larger
ranks, dW is built in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lorafold.core.contexts import recomputed
from lorafold.core.delta import Dense
from lorafold.core.layer import Layer, add
from lorafold.core.spec import Spec
from lorafold.methods.common.options_and_init import check, kaiming, set_alpha, zeros
from lorafold.ops.hadamard import hadamard


class LoHaDelta(Dense):
    """The factors w1_a and w2_a (*matrices, out, r), and w1_b and w2_b (*matrices, r, in), fp32."""

    setting_names = ("scale",)

    def __init__(self, layer: Layer, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        out, inn = layer.shape
        # if U and V have at most a third of W's elements, their three matmuls take less time than
        # the gradient of a dense dW
        self.small = 3 * rank**2 * (out + inn) <= out * inn
        shapes = [(*layer.matrices, *sides) for sides in ((out, rank), (rank, inn))] * 2
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (zeros(s, layer.device) for s in shapes)
        for p in (self.w1_a, self.w1_b, self.w2_a):
            kaiming(p)

    def delta(self) -> Tensor:
        return hadamard(self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.scale)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if not self.small:
            return super().forward(layer, x, onto)
        return layer(x, onto=add(recomputed(partial(self.branch, layer), x), onto))

    def branch(self, layer: Layer, x: Tensor) -> Tensor:
        """U V x, from (..., in) to (..., out). The caller recomputes U and V in the backward pass,
        because storing them takes more memory than the factors.
        """
        up = self.w1_a[..., :, None] * (self.scale * self.w2_a)[..., None, :]
        down = self.w1_b[..., :, None, :] * self.w2_b[..., None, :, :]
        return layer.branch(x, down.flatten(-3, -2), up.flatten(-2), 0.0)


@dataclass(frozen=True)
class LoHa(Spec):
    """LoHa: an update that is the elementwise product of two low-rank matrices.

    Args:
        rank: the rank r of each of the two matrices.
        alpha: the numerator of the scale alpha / r (None: r).
    """

    rank: int = 8
    alpha: float | None = None

    lr = 5e-3

    def __post_init__(self) -> None:
        check(self, whole=("rank",))
        set_alpha(self, self.rank)

    def build(self, layer: Layer) -> LoHaDelta:
        return LoHaDelta(layer, self.rank, self.alpha / self.rank)  # type: ignore[operator]
