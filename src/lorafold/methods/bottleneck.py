"""Bottleneck adapters: a small network after the attention and after the MLP of every block.

    y = sublayer(x) + U f(D sublayer(x) + d) + u        D (m, d), U (d, m) zero at start, f = GELU
                                                        or ReLU

Houlsby et al. 2019, arXiv 1902.00751, sec. 2.1 (after both); Pfeiffer et al. 2021, arXiv 2005.00247
(after the MLP only: half the cost). Because of the nonlinearity, a bottleneck adapter can't be
merged, and it slows down every token. Use it as the baseline that the LoRA paper compares with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.core.delta import Opaque
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.layers import output_width
from lorafold.methods.common.options_and_init import check, kaiming, zeros

Activation = Literal["gelu", "relu"]
After = Literal["both", "mlp"]


class BottleneckDelta(Opaque):
    """The parameters down (m, d), down_bias (m,), up (d, m) and up_bias (d,), which are fp32 and
    applied in the dtype of the activations.

    If a sublayer returns a tuple, such as attention outputs and weights, only the first element is
    changed.
    """

    up_names = ("up",)
    setting_names = ("activation",)

    def __init__(self, dim: int, size: int, activation: Activation, device: torch.device) -> None:
        super().__init__()
        self.activation = activation
        self.down, self.down_bias = zeros((size, dim), device), zeros((size,), device)
        self.up, self.up_bias = zeros((dim, size), device), zeros((dim,), device)
        kaiming(self.down)

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        output = layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.adapt(output[0]), *output[1:])
        return self.adapt(output)

    def adapt(self, y: Tensor) -> Tensor:  # (..., d)
        """The output of a sublayer (..., d) plus the output of the bottleneck network for it."""
        own = (self.down, self.down_bias, self.up, self.up_bias)
        down, down_bias, up, up_bias = (p.to(y.dtype) for p in own)
        return y + F.linear(getattr(F, self.activation)(F.linear(y, down, down_bias)), up, up_bias)


@dataclass(frozen=True)
class Bottleneck(Spec):
    """A bottleneck adapter.

    Args:
        size: the size m of the bottleneck.
        activation: gelu or relu.
        after: insert it after "both" sublayers of a block (Houlsby), or only after the "mlp"
            (Pfeiffer).
    """

    size: int = 64
    activation: Activation = "gelu"
    after: After = "both"

    lr = 1e-3
    modifies_architecture = True

    def __post_init__(self) -> None:
        choices = {"activation": get_args(Activation), "after": get_args(After)}
        check(self, whole=("size",), one_of=choices)

    @property
    def targets(self) -> str:  # type: ignore[override]
        return "sublayers" if self.after == "both" else "mlp-sublayers"

    def build(self, layer: Layer) -> BottleneckDelta:
        return BottleneckDelta(output_width(layer.module), self.size, self.activation, layer.device)
