"""LoRA: a low-rank update of a frozen matrix.

    y = W x + s B A drop(x)         A (r, in) random, B (out, r) zero, s = alpha / r, or alpha /
                                    sqrt(r) (rsLoRA)

Hu et al. 2021, arXiv 2106.09685, eq. 3; rank-stabilized scale: Kalajdzievski 2023, arXiv
2312.03732. LoRA is the default method: it trains r (out + in) parameters per matrix, and costs
nothing once merged. At step 0 the model equals the base, and the gradient of A is exactly zero. B
has a larger learning rate than A (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

With LoftQ's init (Li et al. 2023, arXiv 2310.08659, eq. 6), s B A starts instead as the best
approximation of rank r of the quantization error, original minus quantized weights. LoftQ then
quantizes W - s B A and repeats, which gives each adapter its own base; lorafold stops after the
first round, so that adapters can share a base.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from lorafold.core.delta import Factors, LowRank
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.core.targets import pattern_matches
from lorafold.errors import LorafoldError
from lorafold.methods.common.options_and_init import check, kaiming, set_alpha, zeros
from lorafold.ops.svd import best_of_rank

Init = Literal["kaiming", "gaussian", "loftq"]


class LoRADelta(LowRank):
    """The factors A (*matrices, r, in) and B (*matrices, out, r), fp32. B is multiplied by the
    scale s in fp32, before any rounding.
    """

    up_names = ("B",)
    setting_names = ("scale",)

    def __init__(self, layer: Layer, rank: int, scale: float, dropout: float, init: Init) -> None:
        super().__init__(dropout)
        self.scale = scale
        (out, inn), matrices, device = layer.shape, layer.matrices, layer.device
        shape = (*matrices, rank, inn)
        self.A = nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))
        self.B = zeros((*matrices, out, rank), device)
        if init == "gaussian":
            nn.init.normal_(self.A, std=1 / rank)
        else:
            kaiming(self.A)

    def factors(self) -> Factors:
        return self.scale * self.B, self.A

    def scaled(self) -> tuple[Tensor, Tensor, float]:
        return self.B, self.A, self.scale


@dataclass(frozen=True)
class LoRA(Spec):
    """LoRA: a low-rank update B A of a frozen matrix.

    Args:
        rank: the rank r.
        alpha: the numerator of the scale (None: 2 r).
        dropout: the dropout probability on the branch.
        rslora: divide alpha by sqrt(r) instead of r.
        init: kaiming (uniform, as in PEFT) or gaussian for A; or loftq for both factors, which
            corrects the rounding of a quantized base, so merge it into the dequantized base.
        rank_pattern: ranks by regular expression, for the modules whose path ends in a match; the
            first matching expression applies.
        alpha_pattern: alphas, in the form of `rank_pattern`.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.05
    rslora: bool = False
    init: Init = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    lr_b = 3e-3

    def __post_init__(self) -> None:
        set_alpha(self, 2 * self.rank)
        check(
            self, whole=("rank", "rank_pattern"), below_one=("dropout",),
            one_of={"init": get_args(Init)},
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """The scale s: alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)  # type: ignore[operator]

    def at(self, path: str) -> Self:
        def first(pattern: Mapping[str, Any], default: Any) -> Any:
            return next((v for key, v in pattern.items() if pattern_matches(key, path)), default)

        if not (self.rank_pattern or self.alpha_pattern):
            return self
        rank, alpha = first(self.rank_pattern, self.rank), first(self.alpha_pattern, self.alpha)
        return replace(self, rank=rank, alpha=alpha)

    def build(self, layer: Layer) -> LoRADelta:
        delta = LoRADelta(layer, self.rank, self.scale, self.dropout, self.init)
        if self.init == "loftq":
            if self.rank > min(layer.shape):
                raise LorafoldError(
                    f"init loftq: found rank {self.rank} for a matrix {layer.shape}, expected at"
                    f" most {min(layer.shape)}"
                )
            with torch.no_grad():
                error = layer.original().to(layer.device).float() - layer.dense()[0].float()
                b, a = best_of_rank(error, self.rank, self.scale)
                delta.B.copy_(b)
                delta.A.copy_(a)
        return delta


def lora_with_ranks(ranks: Mapping[str, int]) -> LoRA:
    """LoRA with these ranks by module path and a scale of 1. The spec's rank is the most common
    one; its patterns list the others.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != usual}
    return LoRA(rank=usual, alpha=usual, dropout=0.0, rank_pattern=others, alpha_pattern=others)
