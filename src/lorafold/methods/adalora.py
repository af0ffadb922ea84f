"""AdaLoRA: low rank in the form of an SVD, whose budget of ranks moves to the matrices where it
counts.

    y = W x + s P diag(E) Q drop(x)         P (out, r), E (r,) zero, Q (r, in), s = alpha / (r +
                                            1e-5), r the rank at start
    loss + orth_reg mean(|P^T P - I|, |Q Q^T - I|)      Frobenius norms, over all matrices of the
                                                        adapter

Zhang et al. 2023, arXiv 2303.10512. After every step each triplet (a column of P, an entry of E, a
row of Q) is scored by smoothed sensitivity times uncertainty (eq. 8 to 12); the best b(t) of the
whole adapter keep their E, b falling along a cubic from init_rank to rank a matrix (eq. 13). What
the last allocation left out is dropped from what is saved. Use it where layers differ in what they
need; it costs twice the adapter in averages, and runs long enough to have three phases: tinit steps
at full rank, the fall, tfinal at the end.

The penalty is that of the authors' code: the mean of the norms, where the paper's eq. 4 sums their
squares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lorafold.core.delta import Delta, LowRank
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.core.targets import pattern_matches
from lorafold.errors import LorafoldError

PARTS = ("P", "E", "Q")
AVERAGES = ("sensitivity", "uncertainty")


class AdaLoRADelta(LowRank):
    """P (out, r), E (r,), Q (r, in), fp32; kept (r,), the triplets of the last allocation; the
    running averages of each part.
    """

    up_names = ("P",)
    run_names = ("kept", *(f"{name}_{part}" for part in PARTS for name in AVERAGES))
    kept: Tensor

    def __init__(
        self,
        out: int,
        inn: int,
        rank: int,
        init_rank: int,
        alpha: float,
        dropout: float,
        orth_reg: float,
        device: torch.device,
    ) -> None:
        super().__init__(dropout)
        self.init_rank = init_rank
        scale = alpha / (init_rank + 1e-5)  # of the rank at start, whatever is left of it
        # two of the norms; `join` knows of how many
        self.scale, self.orth_reg, self.share = scale, orth_reg, 0.5
        self.P = nn.Parameter(torch.randn(out, rank, device=device, dtype=torch.float32) * 0.02)
        self.E = nn.Parameter(torch.zeros(rank, device=device, dtype=torch.float32))
        self.Q = nn.Parameter(torch.randn(rank, inn, device=device, dtype=torch.float32) * 0.02)
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=device))
        for part in PARTS:
            for name in AVERAGES:
                self.register_buffer(
                    f"{name}_{part}", torch.zeros_like(getattr(self, part)).detach()
                )

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.P * (self.scale * self.E), self.Q

    def penalty(self) -> Tensor:
        eye = torch.eye(len(self.E), device=self.E.device)
        return (
            self.orth_reg
            * self.share
            * sum(torch.linalg.norm(g - eye) for g in (self.P.t() @ self.P, self.Q @ self.Q.t()))
        )

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """One step of the averages (eq. 9 and 10), from the parameters and their gradients."""
        for part in PARTS:
            p = getattr(self, part)
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            sensitivity, uncertainty = (
                getattr(self, f"sensitivity_{part}"),
                getattr(self, f"uncertainty_{part}"),
            )
            sensitivity.lerp_(now, 1 - beta1)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - beta2)

    def scores(self) -> Tensor:  # (r,), eq. 8
        p, e, q = (
            getattr(self, f"sensitivity_{part}") * getattr(self, f"uncertainty_{part}")
            for part in PARTS
        )
        return e + p.mean(0) + q.mean(1)

    @torch.no_grad()
    def mask(self) -> None:
        self.E.mul_(self.kept)


@dataclass(frozen=True)
class AdaLoRA(Spec):
    """rank, the average at the end; init_rank at start (None: 1.5 rank); alpha (None: 2 init_rank);
    dropout on the branch.

    tinit, tfinal: length of the first and the last phase, a share of the run below 1, or steps;
    delta_t: steps between allocations; beta1, beta2: smoothing of sensitivity and uncertainty;
    orth_reg: weight of the orthogonality penalty; rank_pattern: ranks at modules whose path ends in
    the key (a regex), as a file of a pruned adapter has them. LorafoldError for values out of
    range.
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

    lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        first = (3 * self.rank + 1) // 2 if self.init_rank is None else self.init_rank
        object.__setattr__(self, "init_rank", first)
        object.__setattr__(self, "alpha", float(2 * first if self.alpha is None else self.alpha))
        checks = {
            f"rank {self.rank!r} (a whole number from 1)": (
                isinstance(self.rank, int) and self.rank >= 1
            ),
            f"init_rank {self.init_rank!r} (at least rank, {self.rank})": (
                self.init_rank >= self.rank  # type: ignore[operator]
            ),
            f"dropout {self.dropout!r} (0 or more, below 1)": 0 <= self.dropout < 1,
            f"tinit {self.tinit!r}, tfinal {self.tfinal!r} (0 or more)": (
                self.tinit >= 0 and self.tfinal >= 0
            ),
            f"delta_t {self.delta_t!r} (a whole number from 1)": (
                isinstance(self.delta_t, int) and self.delta_t >= 1
            ),
            f"beta1 {self.beta1!r}, beta2 {self.beta2!r} (between 0 and 1)": (
                0 < self.beta1 < 1 and 0 < self.beta2 < 1
            ),
            f"orth_reg {self.orth_reg!r} (0 or more)": self.orth_reg >= 0,
        }
        if wrong := [what for what, right in checks.items() if not right]:
            raise LorafoldError(f"AdaLoRA: {'; '.join(wrong)}")

    def at(self, path: str) -> Self:
        return replace(
            self,
            rank_pattern=dict(
                [hit for hit in self.rank_pattern.items() if pattern_matches(hit[0], path)][:1]
            ),
        )

    def build(self, layer: Layer) -> AdaLoRADelta:
        out, inn = layer.shape
        first: Any = self.init_rank
        alpha: Any = self.alpha
        rank = next(iter(self.rank_pattern.values()), first)
        options = (alpha, self.dropout, self.orth_reg, layer.device)
        return AdaLoRADelta(out, inn, rank, first, *options)

    def join(self, deltas: Mapping[str, Delta]) -> None:
        for delta in deltas.values():
            delta.share = 1 / (2 * len(deltas))  # type: ignore[assignment]

    def phases(self, total: int) -> tuple[int, int]:
        """The last step at full rank, and the step of the last allocation."""
        first, final = (round(n * total) if n < 1 else int(n) for n in (self.tinit, self.tfinal))
        if first >= total - final:
            raise LorafoldError(
                f"AdaLoRA: tinit {first} and tfinal {final} steps leave none of {total} for the"
                " ranks to fall; lower them"
            )
        return first, total - final

    def budget(self, step: int, total: int, full: int, target: int) -> int:
        """b(t), eq. 13: triplets left after `step` of `total`, from `full` at start to `target`, of
        the whole adapter.
        """
        first, last = self.phases(total)
        left = 1 - min(max((step - first) / (last - first), 0), 1)
        return int((full - target) * left**3 + target)

    def after_step(self, deltas: Mapping[str, Delta], step: int, total: int) -> None:
        laid: list[AdaLoRADelta] = list(deltas.values())  # type: ignore[arg-type]
        first, last = self.phases(total)
        if step < last:
            for delta in laid:
                delta.observe(self.beta1, self.beta2)
        due = step == last or (first < step < last and step % self.delta_t == 0)
        if due:
            full = sum(len(delta.E) for delta in laid)
            allocate(laid, self.budget(step, total, full, min(full, self.rank * len(laid))))
        if due or step > last:
            for delta in laid:
                delta.mask()

    def report(self, deltas: Mapping[str, Delta]) -> str:
        """The ranks that are left, one line for the matrices that differ in their numbers only, in
        the order of the layers.
        """
        left = ranks(deltas)
        lines: dict[str, list[str]] = {}
        for path, rank in left.items():
            lines.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(str(rank))
        head = f"ranks left, {sum(left.values()) / len(left):.2f} on average:"
        return "\n  ".join([head, *(f"{name}: {' '.join(found)}" for name, found in lines.items())])


@torch.no_grad()
def allocate(laid: list[AdaLoRADelta], budget: int) -> None:
    """Keep the `budget` triplets of all deltas that score highest."""
    scores = torch.cat([delta.scores() for delta in laid])
    worst = len(scores) - budget
    threshold = scores.kthvalue(worst).values if worst else scores.new_tensor(float("-inf"))
    for delta in laid:
        delta.kept.copy_(delta.scores() > threshold)


def ranks(deltas: Mapping[str, Delta]) -> dict[str, int]:
    """The rank that the last allocation left to each matrix, by module path."""
    return {path: int(delta.kept.sum()) for path, delta in deltas.items()}  # type: ignore[operator]
