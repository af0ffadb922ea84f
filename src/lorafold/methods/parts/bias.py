"""A trained bias, as an offset on a layer's output.

    y = layer(x) + c                c (out,), zero at start

The offset is small where the bias may be large, so it is added before the layer's rounding and the
bias itself after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.delta import Delta
from lorafold.core.layer import Layer, add


class BiasDelta(Delta):
    """c (out,), fp32. Folding adds it to the layer's bias, or makes it the bias of one without."""

    def __init__(self, out: int, device: torch.device) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(out, device=device, dtype=torch.float32))

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Any:
        return layer(x, onto=add(layer.each(self.offset), onto))

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w, add(self.offset, b)
