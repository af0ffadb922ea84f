"""AdaLoRA: a low-rank update in SVD form that assigns more rank to the matrices that need it.

    y = W x + s P diag(E) Q drop(x)         P (out, r), E (r,) zero at start, Q (r, in), s = alpha /
                                            (r + 1e-5), r the rank at start
    loss + orth_reg mean(|P^T P - I|, |Q Q^T - I|)      Frobenius norms, over all matrices of the
                                                        adapter

Zhang et al. 2023, arXiv 2303.10512. Each triplet (a column of P, an entry of E, a row of Q) is
scored by smoothed sensitivity times uncertainty (eq. 8 to 12). In every allocation, the b(t)
triplets of the whole adapter with the highest scores keep their E; the E of all others are set to
zero. b(t) decreases along a cubic, on average from init_rank to rank for each matrix (eq. 13).
Triplets that the last allocation dropped are not saved. Use AdaLoRA if layers need different ranks.
The running averages for the scores take twice the memory of the adapter, and the run must be long
enough for three phases: tinit steps at full rank, the decrease, and tfinal steps at the end.

As in the authors' code, the penalty averages the norms, whereas eq. 4 of the paper sums their
squares.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf, prod
from operator import mul
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import grouped
from lorafold.core.delta import DeltasByPath, Factors, LowRank
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.core.targets import pattern_matches
from lorafold.errors import LorafoldError
from lorafold.methods.common.options_and_init import check, set_alpha, zeros

PARTS = ("P", "E", "Q")
AVERAGES = ("sensitivity", "uncertainty")


class AdaLoRADelta(LowRank):
    """The factors P (*matrices, out, r), E (*matrices, r) and Q (*matrices, r, in), fp32, with
    running averages of the same shapes. The buffer `kept` (*matrices, r) marks the triplets that
    the last allocation kept.
    """

    up_names = ("P",)
    vector_names = ("E",)
    run_names = ("kept", *(f"{name}_{part}" for part in PARTS for name in AVERAGES))
    setting_names = ("scale",)
    kept: Tensor

    def __init__(self, layer: Layer, spec: AdaLoRA) -> None:
        super().__init__(spec.dropout)
        init_rank: Any = spec.init_rank
        rank = next(iter(spec.rank_pattern.values()), init_rank)
        (out, inn), matrices, device = layer.shape, layer.matrices, layer.device
        self.init_rank = init_rank
        self.scale = spec.alpha / (init_rank + 1e-5)  # of the initial rank, also after pruning
        p, q = (*matrices, out, rank), (*matrices, rank, inn)
        self.P = nn.Parameter(torch.randn(p, device=device, dtype=torch.float32) * 0.02)
        self.E = zeros((*matrices, rank), device)
        self.Q = nn.Parameter(torch.randn(q, device=device, dtype=torch.float32) * 0.02)
        self.register_buffer("kept", torch.ones_like(self.E, dtype=torch.bool))
        for part in PARTS:
            for name in AVERAGES:
                zero = torch.zeros_like(getattr(self, part)).detach()
                self.register_buffer(f"{name}_{part}", zero)

    def factors(self) -> Factors:
        return self.P * (self.scale * self.E[..., None, :]), self.Q

    def scaled(self) -> tuple[Tensor, Tensor, float]:
        return self.P * self.E[..., None, :], self.Q, self.scale


@dataclass(frozen=True)
class AdaLoRA(Spec):
    """AdaLoRA: a low-rank update whose ranks are reallocated during training.

    Args:
        rank: the average rank at the end.
        init_rank: the rank at start (None: 1.5 rank).
        alpha: the numerator of the scale (None: 2 init_rank).
        dropout: the dropout probability on the branch.
        tinit: the length of the first phase: a fraction of the run if below 1, else a number of
            steps.
        tfinal: the length of the last phase, in the same units as `tinit`.
        delta_t: the number of steps between two allocations.
        beta1: the decay of the running average of the sensitivity.
        beta2: the decay of the running average of the uncertainty.
        orth_reg: the weight of the orthogonality penalty.
        rank_pattern: ranks by regular expression, for the modules whose path ends in a match; the
            files of a pruned adapter contain them.
    """

    rank: int = 8
    init_rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    tinit: float = 0.1
    tfinal: float = 0.3
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg: float = 0.5
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    lr = 1e-2

    def __post_init__(self) -> None:
        first = (3 * self.rank + 1) // 2 if self.init_rank is None else self.init_rank
        object.__setattr__(self, "init_rank", first)
        set_alpha(self, 2 * first)
        checks = {
            f"init_rank: found {self.init_rank!r}, expected at least rank ({self.rank})": (
                self.init_rank >= self.rank  # type: ignore[operator]
            ),
            f"tinit and tfinal: found {self.tinit!r} and {self.tfinal!r}, expected 0 or more": (
                self.tinit >= 0 and self.tfinal >= 0
            ),
            f"beta1 and beta2: found {self.beta1!r} and {self.beta2!r}, expected between 0 and 1": (
                0 < self.beta1 < 1 and 0 < self.beta2 < 1
            ),
            f"orth_reg: found {self.orth_reg!r}, expected 0 or more": self.orth_reg >= 0,
        }
        wrong = [what for what, right in checks.items() if not right]
        check(self, *wrong, whole=("rank", "delta_t"), below_one=("dropout",))

    def at(self, path: str) -> Self:
        hits = [hit for hit in self.rank_pattern.items() if pattern_matches(hit[0], path)]
        return replace(self, rank_pattern=dict(hits[:1]))

    def build(self, layer: Layer) -> AdaLoRADelta:
        return AdaLoRADelta(layer, self)

    def phases(self, total: int) -> tuple[int, int]:
        """The last step at full rank and the step of the last allocation, in a run of `total`
        steps.
        """
        first, final = (round(n * total) if n < 1 else int(n) for n in (self.tinit, self.tfinal))
        if first >= total - final:
            raise LorafoldError(
                f"AdaLoRA: tinit {first} and tfinal {final} leave none of the {total} steps to"
                " reduce the ranks; lower tinit or tfinal, or train for more steps"
            )
        return first, total - final

    def budget(self, step: int, total: int, full: int, target: int) -> int:
        """b(t) of eq. 13: the number of triplets of the whole adapter to keep after a step."""
        first, last = self.phases(total)
        left = 1 - min(max((step - first) / (last - first), 0), 1)
        return int((full - target) * left**3 + target)

    def penalty(self, deltas: DeltasByPath) -> Tensor:
        adapted: list[AdaLoRADelta] = list(deltas.values())  # type: ignore[arg-type]
        grams = defaultdict[int, list[Tensor]](list)  # by rank, (n, r, r)
        for delta in adapted:
            (p, q), shape = (delta.P, delta.Q), (number_of_matrices(delta), *2 * delta.E.shape[-1:])
            grams[shape[-1]] += (gram.reshape(shape) for gram in (p.mT @ p, q @ q.mT))
        norms = [
            torch.linalg.matrix_norm(torch.cat(each) - torch.eye(r, device=each[0].device))
            for r, each in grams.items()
        ]
        return self.orth_reg * torch.cat(norms).mean()

    def after_step(self, deltas: DeltasByPath, step: int, total: int) -> None:
        adapted: list[AdaLoRADelta] = list(deltas.values())  # type: ignore[arg-type]
        first, last = self.phases(total)
        if step < last:
            update_averages(adapted, self.beta1, self.beta2)
        due = step == last or (first < step < last and step % self.delta_t == 0)
        if due:
            full = sum(delta.E.numel() for delta in adapted)
            least = self.rank * sum(map(number_of_matrices, adapted))
            allocate(adapted, self.budget(step, total, full, min(full, least)))
        if due or step > last:
            with torch.no_grad():  # E is 0 for the triplets that the last allocation dropped
                torch._foreach_mul_([d.E for d in adapted], [d.kept for d in adapted])

    def report(self, deltas: DeltasByPath) -> str:
        ranks_by_path = ranks(deltas)
        lines = grouped(
            (re.sub(r"\b\d+\b", "*", path), f"{rank:.4g}") for path, rank in ranks_by_path.items()
        )
        counts = [number_of_matrices(delta) for delta in deltas.values()]
        mean = sum(map(mul, ranks_by_path.values(), counts)) / sum(counts)
        head = f"remaining ranks, {mean:.2f} on average:"
        return "\n  ".join([head, *(f"{name}: {' '.join(each)}" for name, each in lines.items())])


@torch.no_grad()
def update_averages(deltas: list[AdaLoRADelta], beta1: float, beta2: float) -> None:
    """Updates the running averages (eq. 9 and 10), with decay `beta1` for the sensitivity and
    `beta2` for the uncertainty.
    """
    pairs = [(delta, part) for delta in deltas for part in PARTS]
    parameters = [getattr(delta, part) for delta, part in pairs]
    sensitivity = [getattr(delta, f"sensitivity_{part}") for delta, part in pairs]
    uncertainty = [getattr(delta, f"uncertainty_{part}") for delta, part in pairs]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    change = torch._foreach_mul(parameters, grads)
    torch._foreach_abs_(change)
    torch._foreach_lerp_(sensitivity, change, 1 - beta1)
    torch._foreach_sub_(change, sensitivity)
    torch._foreach_abs_(change)
    torch._foreach_lerp_(uncertainty, change, 1 - beta2)


def scores(deltas: list[AdaLoRADelta]) -> list[Tensor]:  # each (*matrices, r)
    """The scores of the triplets of each delta (eq. 8)."""
    p, e, q = (
        torch._foreach_mul(*([getattr(d, f"{name}_{part}") for d in deltas] for name in AVERAGES))
        for part in PARTS
    )
    sums = torch._foreach_add(e, [one.mean(-2) for one in p])
    return list(torch._foreach_add(sums, [one.mean(-1) for one in q]))


@torch.no_grad()
def allocate(deltas: list[AdaLoRADelta], budget: int) -> None:
    """Keeps the `budget` triplets with the highest scores among all deltas, and drops the others.
    """
    by_delta = [score.flatten() for score in scores(deltas)]
    flat = torch.cat(by_delta)
    num_dropped = len(flat) - budget
    threshold = flat.kthvalue(num_dropped).values if num_dropped else flat.new_tensor(-inf)
    masks = (flat > threshold).split([*map(len, by_delta)])  # one comparison for all modules
    pairs = zip(deltas, masks, strict=True)
    torch._foreach_copy_([d.kept for d in deltas], [mask.view(d.kept.shape) for d, mask in pairs])


def number_of_matrices(delta: Any) -> int:
    """The number of matrices that an AdaLoRA delta adapts: one, or one for each expert."""
    return prod(delta.kept.shape[:-1])


def ranks(deltas: DeltasByPath) -> dict[str, float]:
    """The rank of each matrix after the last allocation, by module path; for experts, the mean
    rank.
    """
    return {
        path: int(delta.kept.sum()) / number_of_matrices(delta)  # type: ignore[operator]
        for path, delta in deltas.items()
    }
