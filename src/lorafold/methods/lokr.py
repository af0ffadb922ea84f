"""LoKr: the Kronecker product of two small matrices.

    y = W x + dW x + b              dW = alpha / r kron(C, D), C (o1, i1) zero at start, D (o2, i2),
                                    o1 o2 = out, i1 i2 = in
    dW x = D X C^T                  for x reshaped to X (i2, i1)

Yeh et al. 2024 (LyCORIS), arXiv 2309.14859, sec. 3; Edalati et al. 2022 (KronA), arXiv 2212.10650.
LoKr is a high-rank update with very few parameters. In linear layers, dW is not built, because the
second form needs only 7% as many multiplications as the layer itself (at 1536 x 576). D is itself a
product D1 D2 of rank r if r is less than half its larger side; with `decompose_both`, the same
holds for C.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from lorafold.core.delta import Additive
from lorafold.core.layer import Layer, add
from lorafold.core.spec import Spec
from lorafold.methods.common.options_and_init import check, kaiming, set_alpha, zeros


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Splits a size into a product (m, n) with m <= n: m is the largest divisor that exceeds
    neither the square root of `size` nor `factor` (-1: no limit).

    If `factor` divides `size`, m is `factor` even if it exceeds the square root, as in PEFT;
    LyCORIS would swap m and n.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    top = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    m = next(d for d in range(top, 0, -1) if size % d == 0)
    return m, size // m


class LoKrDelta(Additive):
    """C is w1 (o1, i1), or the product of w1_a (o1, r) and w1_b (r, i1). D is w2 (o2, i2), or the
    product of w2_a (o2, r) and w2_b (r, i2). All tensors are fp32, and have the leading dimension
    (*matrices) if the layer has several matrices.
    """

    setting_names = ("scale",)

    def __init__(
        self,
        layer: Layer,
        outs: tuple[int, int],
        ins: tuple[int, int],
        rank: int,
        scale: float,
        split: tuple[bool, bool],
    ) -> None:
        super().__init__()
        self.scale = scale
        shapes: dict[str, tuple[int, int]] = {}
        for name, o, i, low in zip(("w1", "w2"), outs, ins, split, strict=True):
            shapes |= {f"{name}_a": (o, rank), f"{name}_b": (rank, i)} if low else {name: (o, i)}
        for name, shape in shapes.items():
            setattr(self, name, p := zeros((*layer.matrices, *shape), layer.device))
            if name not in ("w1", "w1_a"):
                kaiming(p)

    def pair(self) -> tuple[Tensor, Tensor]:
        """C times the scale (*matrices, o1, i1), and D (*matrices, o2, i2)."""
        own: Any = self._parameters
        c, d = (own[n] if n in own else own[f"{n}_a"] @ own[f"{n}_b"] for n in ("w1", "w2"))
        return self.scale * c, d

    def delta(self) -> Tensor:
        c, d = self.pair()
        return (c[..., :, None, :, None] * d[..., None, :, None, :]).flatten(-4, -3).flatten(-2)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if not layer.takes_vectors:
            return layer(x, onto=add(layer.op(x, self.delta()), onto))
        c, d = (m.to(x.dtype) for m in self.pair())
        u = layer.op(x.unflatten(-1, (c.shape[-1], d.shape[-1])), d)  # (..., i1, o2)
        return layer(x, onto=add(layer.op(u.mT, c).mT.flatten(-2), onto))


@dataclass(frozen=True)
class LoKr(Spec):
    """LoKr: an update that is a Kronecker product.

    Args:
        rank: the rank r.
        alpha: the numerator of the scale alpha / r (None: r), which applies at full rank too.
        decompose_factor: the first factor of each matrix dimension, if it divides the dimension;
            otherwise the largest smaller divisor that is at most the square root (-1: the largest
            divisor that is at most the square root).
        decompose_both: let C be a product of rank r too.
    """

    rank_is_dimension = False  # at a large rank both factors are full matrices

    rank: int = 8
    alpha: float | None = None
    decompose_factor: int = -1
    decompose_both: bool = False

    lr = 5e-3

    def __post_init__(self) -> None:
        factor = self.decompose_factor
        message = f"decompose_factor: found {factor!r}, expected a positive integer, or -1"
        check(self, *[message] * (factor != -1 and factor < 1), whole=("rank",))
        set_alpha(self, self.rank)

    def build(self, layer: Layer) -> LoKrDelta:
        out, inn, window = *layer.shape, layer.window
        outs, ins = (factorization(n, self.decompose_factor) for n in (out, inn // window))
        low = [self.rank < max(o, i) / 2 for o, i in zip(outs, ins, strict=True)]
        split = low[0] and self.decompose_both, low[1]
        scale = self.alpha / self.rank  # type: ignore[operator]
        return LoKrDelta(layer, outs, (ins[0], ins[1] * window), self.rank, scale, split)
