"""A storage of the tests' own: 8-bit codes and one scale, in buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafold.layers.bitsandbytes import Quantized


class Codes(nn.Module):
    """A linear that has no parameter."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = w.shape
        self.bias = None
        self.register_buffer("scale", w.detach().float().abs().amax() / 127)
        self.register_buffer("codes", (w.detach().float() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes * self.scale).to(x.dtype).t()


class CodesLayer(Quantized):
    dtype: torch.dtype = torch.bfloat16  # type: ignore[assignment]

    def dequantized(self) -> Tensor:
        found: Tensor = self.bare.codes * self.bare.scale  # type: ignore[operator]
        return found.to(self.dtype)


PATH = f"{Codes.__module__}.{Codes.__qualname__}"
