"""PiSSA and OLoRA: LoRA whose factors start from a part of W, as an offset that does not change W.

    y = W x + s (B A - B0 A0) drop(x)       A (r, in), B (out, r) trained; A0, B0 their values at
                                            start
    s (B A - B0 A0) = [s (B - B0), s B0] [A; A - A0]        rank 2 r; both differences are computed
                                                            in fp32

PiSSA: Meng et al. 2024, arXiv 2404.02948, eq. 2 to 4: W ~ U S V^T, s B0 A0 its r largest singular
parts, U sqrt(S) and sqrt(S) V^T. OLoRA: Bueyuekakyuez 2024, arXiv 2406.01775: W = Q R, B0 the first
r columns of Q, A0 the first r rows of R. Use PiSSA or OLoRA if LoRA learns too slowly in its first
steps. The papers train on the residual W - s B0 A0. lorafold subtracts s B0 A0 from the update
instead and leaves the base unchanged, so that the base can be quantized and shared, and the model
equals the base bit for bit at step 0 (see the second form). The adapter is saved as LoRA of rank
2 r.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafold.core.delta import Factors, LowRank
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.common.options_and_init import check, set_alpha
from lorafold.ops.svd import best_of_rank


class OffsetDelta(LowRank):
    """The factors A (*matrices, r, in) and B (*matrices, out, r), fp32, and their initial values in
    the buffers A0 and B0.
    """

    up_names = ("B",)
    run_names = ("A0", "B0")
    setting_names = ("scale",)
    A0: Tensor
    B0: Tensor

    def __init__(self, b: Tensor, a: Tensor, scale: float, dropout: float) -> None:
        super().__init__(dropout)
        self.scale = scale
        self.A, self.B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.register_buffer("A0", a.clone())
        self.register_buffer("B0", b.clone())

    def factors(self) -> Factors:  # up (out, 2 r), down (2 r, in)
        up = self.scale * torch.cat([self.B - self.B0, self.B0], -1)
        return up, torch.cat([self.A, self.A - self.A0], -2)


@dataclass(frozen=True)
class FromWeight(Spec):
    """Abstract: LoRA whose factors start from the layer's own matrix.

    Args:
        rank: the rank r.
        alpha: the numerator of the scale (None: r).
        dropout: the dropout probability on the branch.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    lr = 5e-4

    def __post_init__(self) -> None:
        check(self, whole=("rank",), below_one=("dropout",))
        set_alpha(self, self.rank)

    @property
    def scale(self) -> float:
        """The scale s = alpha / r."""
        return self.alpha / self.rank  # type: ignore[operator]

    @abstractmethod
    def initial(self, w: Tensor) -> Factors:
        """The initial factors B0 (*matrices, out, r) and A0 (*matrices, r, in), from the matrices w
        (*matrices, out, in).
        """

    def build(self, layer: Layer) -> OffsetDelta:
        if self.rank > min(layer.shape):
            raise LorafoldError(
                f"{type(self).__name__}: found rank {self.rank} for a matrix {layer.shape},"
                f" expected at most {min(layer.shape)}"
            )
        with torch.no_grad():
            return OffsetDelta(*self.initial(layer.dense()[0].float()), self.scale, self.dropout)


@dataclass(frozen=True)
class PiSSA(FromWeight):
    """PiSSA: LoRA whose factors start from the largest singular values and vectors of W.

    Args:
        niter: the number of subspace iterations of the randomized SVD (0: a full SVD).
    """

    niter: int = 16

    def initial(self, w: Tensor) -> Factors:
        return best_of_rank(w, self.rank, self.scale, self.niter)


@dataclass(frozen=True)
class OLoRA(FromWeight):
    """OLoRA: LoRA whose factors start from the QR decomposition of W."""

    def initial(self, w: Tensor) -> Factors:
        q, r = torch.linalg.qr(w)
        return q[..., : self.rank], r[..., : self.rank, :]
