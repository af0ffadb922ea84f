"""Fastfood: training in a random subspace, which measures how few parameters a task needs.

    dW_i = l_i P_i v / sqrt(d)          v (d,) zero at start, shared by all matrices; l_i () one at
                                        start, for each matrix
    P_i v = H G_i Q H B v / sqrt(n_i)   B random signs, Q a random permutation, G_i n_i blocks of
                                        Gaussian values, H orthonormal Walsh-Hadamard, v padded
                                        to length 2^k

The smallest d that reaches 90% of full training's performance is the task's intrinsic dimension (Li
et al. 2018, arXiv 1804.08838). The projection is Fastfood (Le et al. 2013), with a learned scale
per matrix (Aghajanyan et al. 2021, arXiv 2012.13255, sec. 3.2). Because of the division by sqrt(d),
one learning rate suits all d. Fastfood is slow, since it builds dW in every step, and is meant for
measuring tasks rather than for learning them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.delta import DeltasByPath, Dense
from lorafold.core.layer import Layer
from lorafold.core.rounding import rounded
from lorafold.core.spec import Spec
from lorafold.methods.common.options_and_init import check
from lorafold.methods.full import Full
from lorafold.ops.walsh import hadamard_factors, walsh


class Subspace(nn.Module):
    """The vector v (d,), fp32, the random signs B (L,) and the permutation Q (L,), where L is the
    smallest power of 2 that is at least d.
    """

    entry_names = ("vector",)
    signs: Tensor
    order: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, vector: Tensor, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        length = 1 << (len(vector) - 1).bit_length()
        self.vector = nn.Parameter(vector)
        signs = torch.randint(0, 2, (length,), generator=generator) * 2.0 - 1
        tensors = signs, torch.randperm(length, generator=generator), *hadamard_factors(length)
        for name, tensor in zip(("signs", "order", "left", "right"), tensors, strict=True):
            self.register_buffer(name, tensor.to(device), persistent=False)

    def transformed(self, x: Tensor) -> Tensor:  # (..., L)
        """The Walsh-Hadamard transform of x (..., L) times sqrt(L). With this scale the matrix has
        entries 1 and -1, which 16-bit dtypes represent exactly.
        """
        return walsh(x, self.left.sign().to(x), self.right.sign().to(x))

    def shared_projection(self) -> Tensor:  # (L,)
        """Q H B v / sqrt(d), the part of the projection that is the same for all matrices."""
        filled = nn.functional.pad(self.vector, (0, len(self.signs) - len(self.vector)))
        length = len(self.vector) * len(self.signs)
        return self.transformed(filled * self.signs)[self.order] / length**0.5


class FastfoodDelta(Dense):
    """The scale l (), fp32, and the Gaussian values G (blocks, L), bf16.

    The first delta of an adapter has the subspace as a submodule; the other deltas refer to that
    delta.
    """

    setting_names = ("seed",)
    gaussians: Tensor
    subspace: Subspace | None

    def __init__(self, shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        super().__init__()
        self.shape, self.seed = shape, seed
        self.scale = nn.Parameter(torch.ones((), device=device))
        self.subspace = None

    def share_subspace(
        self, owner: FastfoodDelta, generator: torch.Generator, device: torch.device
    ) -> None:
        """Samples G, and stores a reference to the delta that has the subspace."""
        self._owner = (owner,)  # in a tuple, so that it does not become a submodule of each delta
        length = len(owner.subspace.signs)  # type: ignore[union-attr]
        blocks = ceil(prod(self.shape) / length)
        gaussians = torch.randn(blocks, length, generator=generator).bfloat16()
        self.register_buffer("gaussians", gaussians.to(device), persistent=False)

    def delta(self) -> Tensor:  # (*matrices, out, in)
        return self.projected(torch.float32)

    def added(self, w: Tensor) -> Tensor:
        dw = self.projected(w.dtype if w.dtype is torch.bfloat16 else torch.float32)
        return rounded(w.to(torch.promote_types(w.dtype, torch.float32)) + dw, w.dtype)

    def projected(self, dtype: torch.dtype) -> Tensor:  # (*matrices, out, in)
        """dW (*matrices, out, in), computed entirely in `dtype`."""
        subspace: Any = self._owner[0].subspace
        shared = subspace.shared_projection().to(self.gaussians.device)
        gains = shared * self.scale / self.gaussians.numel() ** 0.5
        blocks = subspace.transformed(self.gaussians.to(dtype) * gains.to(dtype))
        return blocks.flatten()[: prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class Fastfood(Spec):
    """Training in a random subspace.

    Args:
        dimension: the dimension d of the subspace.
        seed: the seed of the random directions.
        head_lr: the learning rate of a new head, which is always trained in full.
    """

    dimension: int = 1024
    seed: int = 0
    head_lr: float = Full.lr

    lr = 0.3
    diagnostic = True

    def __post_init__(self) -> None:
        rate = isinstance(self.head_lr, float | int) and self.head_lr > 0
        wrong = [] if rate else [f"head_lr: found {self.head_lr!r}, expected a number above 0"]
        check(self, *wrong, whole=("dimension",))

    @property
    def lr_whole(self) -> float:  # type: ignore[override]
        """The learning rate of a new head."""
        return self.head_lr

    def build(self, layer: Layer) -> FastfoodDelta:
        return FastfoodDelta((*layer.matrices, *layer.shape), self.seed, layer.device)

    def join(self, deltas: DeltasByPath) -> None:
        adapted: list[FastfoodDelta] = [deltas[path] for path in sorted(deltas)]  # type: ignore[misc]
        generator, owner = torch.Generator().manual_seed(self.seed), adapted[0]
        for delta in adapted:
            # sampled even if the parameters are on the meta device, since files lack these tensors
            device = torch.device("cpu") if delta.scale.is_meta else delta.scale.device
            if delta is owner:
                owner.subspace = Subspace(
                    torch.zeros(self.dimension, device=owner.scale.device), generator, device
                )
            delta.share_subspace(owner, generator, device)
