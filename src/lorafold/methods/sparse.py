"""Sparse fine-tuning: k entries of the weights are chosen, and only these are trained.

    W' = W + scatter(values, at)    at (k_i,) positions in row-major W (out, in), values (k_i,) zero
                                    at start; sum of k_i = density * |W|

LT-SFT (Ansell et al. 2022, arXiv 2110.07560, sec. 3) trains all entries for a number of steps,
chooses the k entries of the whole model that changed most, and restarts from W. FISH mask (Sung et
al. 2021, arXiv 2111.09839, eq. 6) chooses the k entries with the largest mean squared gradient over
n losses. Both choose in `prepare`, which needs memory for a dense fp32 update and its gradient
(LT-SFT: also two moments; FISH mask: also the scores). After that, the sizes of values, optimizer
state and files are proportional to k. Without `prepare`, the entries are random. Use sparse
fine-tuning if you want to add up the updates of several tasks, because they rarely change the same
entry.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lorafold.core.delta import DeltasByPath, Dense
from lorafold.core.layer import Layer
from lorafold.core.spec import Losses, Spec
from lorafold.methods.common.options_and_init import check, zeros


class SparseDelta(Dense):
    """The positions `at` (k,), int64, ascending, and their `values` (k,), fp32.

    During `prepare`, `at` is None and `values` contains all entries of the layer's matrices.
    """

    entry_names = ("values",)
    at: Tensor | None

    def __init__(self, shape: tuple[int, ...], at: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("at", at)
        self.values = zeros((len(at),), at.device)

    def delta(self) -> Tensor:
        if self.at is None:
            return self.values.view(self.shape)
        flat = self.values.new_zeros(prod(self.shape))
        return flat.index_put((self.at,), self.values).view(self.shape)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if self.at is None:
            return super().forward(layer, x, onto)
        return layer.sparse(x, self.values, self.at, onto)

    def select(self, at: Tensor | None) -> None:
        """Selects the entries at these positions (k,) for training (None: all entries), and sets
        their values to zero.

        The values are a new parameter, so optimizers must be created afterwards.
        """
        size = prod(self.shape) if at is None else len(at)
        self.at, self.values = at, nn.Parameter(self.values.new_zeros(size))


@dataclass(frozen=True)
class _Sparse(Spec):
    """Abstract: trains a fraction of the entries, which are random unless `prepare` chooses them.
    """

    density: float = 0.005

    lr = 1e-3
    asks_losses = True

    def check(self, *wrong: str, whole: str) -> None:
        if not 0 < self.density <= 1:
            wrong = (f"density: found {self.density!r}, expected above 0 and at most 1", *wrong)
        check(self, *wrong, whole=(whole,))

    def build(self, layer: Layer) -> SparseDelta:
        shape = (*layer.matrices, *layer.shape)
        size = prod(shape)
        at = torch.randperm(size)[: max(1, round(self.density * size))].sort().values
        return SparseDelta(shape, at.to(layer.device))

    def prepare(self, deltas: DeltasByPath, losses: Losses) -> None:
        sparse = [d for d in deltas.values() if isinstance(d, SparseDelta)]
        for delta in sparse:
            delta.select(None)
        scores = self.scores(sparse, losses)
        for delta, at in zip(sparse, largest_positions(scores, self.density), strict=True):
            delta.select(at)

    @abstractmethod
    def scores(self, deltas: list[SparseDelta], losses: Losses) -> list[Tensor]:
        """The scores of all entries of each delta's weight, each (out * in,). During this call,
        `values` contains all entries.
        """


@dataclass(frozen=True)
class LTSFT(_Sparse):
    """LT-SFT: trains the entries that change most in a dense first phase.

    Args:
        density: the fraction of entries that are trained.
        dense_steps: the number of steps of the first phase, which has its own AdamW.
        dense_lr: the learning rate of the first phase.
    """

    dense_steps: int = 50
    dense_lr: float = 5e-5

    lr = 3e-3

    def __post_init__(self) -> None:
        wrong = f"dense_lr: found {self.dense_lr!r}, expected above 0"
        self.check(*[wrong] * (not self.dense_lr > 0), whole="dense_steps")

    def scores(self, deltas: list[SparseDelta], losses: Losses) -> list[Tensor]:
        values = [delta.values for delta in deltas]
        optimizer = AdamW(values, lr=self.dense_lr, weight_decay=0.0)
        for loss in losses(self.dense_steps):
            loss.backward(inputs=values)  # other trained parameters get no gradients
            optimizer.step()
            optimizer.zero_grad()
        return [v.detach().abs() for v in values]


@dataclass(frozen=True)
class FishMask(_Sparse):
    """FISH mask: trains the entries with the largest Fisher information.

    Args:
        density: the fraction of entries that are trained.
        samples: the number of rows whose squared gradients are summed.
    """

    samples: int = 128

    def __post_init__(self) -> None:
        self.check(whole="samples")

    def scores(self, deltas: list[SparseDelta], losses: Losses) -> list[Tensor]:
        values = [delta.values for delta in deltas]
        fisher = [torch.zeros_like(v) for v in values]
        for loss in losses(self.samples, 1):
            loss.backward(inputs=values)
            for total, v in zip(fisher, values, strict=True):
                if v.grad is not None:
                    total.addcmul_(v.grad, v.grad)
                    v.grad = None
        return fisher


def largest_positions(scores: list[Tensor], density: float) -> list[Tensor]:
    """The positions (k_i,), ascending, of the largest scores in each weight, for scores (out * in,)
    of several weights. The fraction `density` applies to all weights together.
    """
    sizes = [len(s) for s in scores]
    keep = max(1, round(density * sum(sizes)))
    at = torch.cat(scores).topk(keep, sorted=False).indices.sort().values
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        at[(at >= start) & (at < start + size)] - start
        for start, size in zip(starts, sizes, strict=True)
    ]
