"""Training in a random subspace: how few numbers does a task take?

    dW_i = l_i P_i v / sqrt(d)          v (d,) zero at start, one for all matrices; l_i one at
                                        start, one a matrix
    P_i v = H G_i Q H B v               B random signs, Q a random order, G_i Gaussian numbers, H
                                        Walsh-Hadamard, v filled up to 2^k

The smallest d that reaches 90% of what full training reaches is the task's intrinsic dimension: Li
et al. 2018, arXiv 1804.08838; with the Fastfood projection (Le et al. 2013) and a learned scale for
every matrix, Aghajanyan et al. 2021, arXiv 2012.13255, sec. 3.2. B and Q are shared, since fresh
Gaussians already make matrices and blocks independent. Divided by sqrt(d), a step of AdamW moves
the weights equally far whatever d is, so one learning rate serves all. Everything random comes from
`seed`. To measure with, not to deploy: dW is built in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafold.core.delta import Delta, Dense
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.ops.walsh import halves, walsh


class Subspace(nn.Module):
    """v (d,), fp32, with B (L,), Q (L,) and H of L numbers, L the power of 2 from d on."""

    signs: Tensor
    order: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, vector: Tensor, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        length = 1 << (len(vector) - 1).bit_length()
        self.vector = nn.Parameter(vector)
        signs = torch.randint(0, 2, (length,), generator=generator) * 2.0 - 1
        self.register_buffer("signs", signs.to(device), persistent=False)
        self.register_buffer(
            "order", torch.randperm(length, generator=generator).to(device), persistent=False
        )
        for name, half in zip(("left", "right"), halves(length), strict=True):
            self.register_buffer(name, half.to(device), persistent=False)

    def transformed(self, x: Tensor) -> Tensor:  # (..., L)
        return walsh(x, self.left.to(x), self.right.to(x))

    def spread(self) -> Tensor:  # (L,)
        """Q H B v / sqrt(d)"""
        filled = nn.functional.pad(self.vector, (0, len(self.signs) - len(self.vector)))
        return self.transformed(filled * self.signs)[self.order] / len(self.vector) ** 0.5


class FastfoodDelta(Dense):
    """l (), fp32, and G (blocks, L), bf16.

    The first delta of an adapter has the subspace, the others know it.
    """

    gaussians: Tensor
    subspace: Subspace | None

    def __init__(self, out: int, inn: int, device: torch.device) -> None:
        super().__init__()
        self.shape = (out, inn)
        self.scale = nn.Parameter(torch.ones((), device=device))
        self.subspace = None

    def join(self, first: FastfoodDelta, generator: torch.Generator, device: torch.device) -> None:
        self._first = (first,)  # not as a module: it would be a part of every delta
        length = len(first.subspace.signs)  # type: ignore[union-attr]
        gaussians = torch.randn(
            ceil(prod(self.shape) / length), length, generator=generator
        ).bfloat16()
        self.register_buffer("gaussians", gaussians.to(device), persistent=False)

    def delta(self) -> Tensor:  # (out, in)
        subspace: Any = self._first[0].subspace
        spread = subspace.spread().to(self.gaussians.device)
        blocks: Tensor = subspace.transformed(
            self.gaussians * (spread * self.scale / len(self.gaussians) ** 0.5)
        )
        return blocks.flatten()[: prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class Fastfood(Spec):
    """dimension d of the subspace; seed of its directions. LorafoldError for a dimension below
    1.
    """

    dimension: int = 1024
    seed: int = 0

    lr: ClassVar[float] = 0.3
    diagnostic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.dimension, int) and self.dimension >= 1):
            raise LorafoldError(f"Fastfood: dimension {self.dimension!r} (a whole number from 1)")

    def build(self, layer: Layer) -> FastfoodDelta:
        out, inn = layer.shape
        return FastfoodDelta(out, inn, layer.device)

    def join(self, deltas: Mapping[str, Delta]) -> None:
        laid: list[FastfoodDelta] = [deltas[path] for path in sorted(deltas)]  # type: ignore[misc]
        generator, first = torch.Generator().manual_seed(self.seed), laid[0]
        for delta in laid:
            # made from a seed: nothing will fill them
            device = torch.device("cpu") if delta.scale.is_meta else delta.scale.device
            if delta is first:
                first.subspace = Subspace(
                    torch.zeros(self.dimension, device=first.scale.device), generator, device
                )
            delta.join(first, generator, device)
