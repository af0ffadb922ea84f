"""The laws of preferences: each with its equation, its paper and its options.

Of each row are given log p(y | x), summed over the tokens of a completion y in nats, for the chosen
completion w and the rejected one l, under the model and, for some, under the reference, which never
moves:

    r(y) = log p(y | x) - log p_ref(y | x)            the implicit reward over beta
    |y|                                               the tokens of y

The first completion is in column 0, the second in column 1. A loss is in nats a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, NamedTuple, TypeVar, dataclass_transform

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from lorafold.data.formats import JUDGED, PAIRS

Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def algorithm(cls: type[T]) -> type[T]:
    """A frozen dataclass, whose options are checked when it is made."""
    return dataclass(frozen=True, config=STRICT)(cls)  # type: ignore[return-value]


class Scored(NamedTuple):
    """The n rows that a law scores: log-probabilities under the model and the reference (n, 2) in
    nats (None without a reference), the tokens of the completions (n, 2), and for judged
    completions whether they are desirable (n,). For a law that reads a head `logps` are its scores.
    `mismatched` has the `ratio_sums` of the mismatched completions of the whole step; with it the
    columns of the completions that have gradients are enough.
    """

    logps: Tensor
    reference: Tensor | None
    tokens: Tensor
    desirable: Tensor | None = None
    mismatched: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """r (n, 2), or log p where there is no reference."""
        return self.logps if self.reference is None else self.logps - self.reference

    @property
    def margins(self) -> Tensor:
        """d = r(w) - r(l), (n,)."""
        return self.ratios[:, 0] - self.ratios[:, 1]

    @property
    def means(self) -> Tensor:
        """log p a token, (n, 2)."""
        return self.logps / self.tokens

    @property
    def nll(self) -> Tensor:
        """The supervised loss of the first completion, in nats a token, (n,)."""
        return -self.means[:, 0]


def ratio_sums(ratios: Tensor) -> Tensor:
    """The sum of ratios r, in nats, and their number, (2,): of parts of a step they add up."""
    return torch.stack([ratios.sum(), ratios.new_tensor(float(ratios.numel()))])


class Law(ABC):
    """Abstract: one law over completions that are compared."""

    kind: ClassVar[str] = PAIRS  # what it is over, of what formats of rows provide
    has_reference: ClassVar[bool] = True
    reads_head: ClassVar[bool] = False  # scores of a head in place of log-probabilities
    trained: ClassVar[int] = 2  # the completions of a row with gradients; the rest are mismatched
    # of a method's own learning rates: a pair is told apart long before its completions are learned
    pace: ClassVar[float] = 0.05
    beta: float  # an option of each that has rewards of its own

    @abstractmethod
    def loss(self, scored: Scored) -> Tensor:
        """The loss of each row, (n,), in nats."""

    def rewards(self, scored: Scored) -> Tensor:
        """The rewards that the law implies for both completions, (n, 2)."""
        return self.beta * (scored.ratios if self.has_reference else scored.means)


@algorithm
class Dpo(Law):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

        loss = -(1 - e) log s(beta d) - e log s(-beta d) + a NLL(w),      d = r(w) - r(l)

    s is the logistic function. With label_smoothing e > 0 it is cDPO (Mitchell 2023), which assumes
    that a share e of the labels is wrong. With sft_weight a > 0 the chosen completion is learned
    too (Pang et al. 2024, arXiv 2404.19733, eq. 1), which keeps its probability from falling.
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: Weight = 0.0

    def loss(self, scored: Scored) -> Tensor:
        margin, e = self.beta * scored.margins, self.label_smoothing
        loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        return loss + self.sft_weight * scored.nll if self.sft_weight else loss


@algorithm
class Ipo(Law):
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036, eq. 17).

        loss = (d - 1 / (2 beta))^2,      d = r(w) / |w| - r(l) / |l|

    The margin has a finite target, so that pairs which all agree do not drive it to infinity. The
    paper's form is for single actions; here ratios are means over tokens, so that beta means the
    same for long and short completions (`per_token`; without it they are sums, as in eq. 17).
    """

    beta: Positive = 0.1
    per_token: bool = True

    def loss(self, scored: Scored) -> Tensor:
        r = scored.ratios / scored.tokens if self.per_token else scored.ratios
        return (r[:, 0] - r[:, 1] - 1 / (2 * self.beta)).square()


@algorithm
class Hinge(Law):
    """The hinge of SLiC on DPO's margin (Zhao et al. 2023, arXiv 2305.10425; in this form Liu et
    al. 2023, arXiv 2309.06657, eq. 13).

        loss = max(0, 1 - beta d),      d = r(w) - r(l)
    """

    beta: Positive = 0.1

    def loss(self, scored: Scored) -> Tensor:
        return (1 - self.beta * scored.margins).relu()


@algorithm
class Orpo(Law):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).

        loss = NLL(w) - beta log s(log odds(w) - log odds(l)),      odds(y) = p / (1 - p),
                                                                   log p = log p(y | x) / |y|

    It has no reference: the supervised loss of the chosen completion is part of it, so it can
    replace supervised fine-tuning.
    """

    has_reference = False
    beta: Positive = 0.1

    def loss(self, scored: Scored) -> Tensor:
        means = scored.means.clamp(max=-1e-6)  # odds are infinite at p = 1
        odds = means - torch.log(-torch.expm1(means))
        return scored.nll - self.beta * F.logsigmoid(odds[:, 0] - odds[:, 1])


@algorithm
class Simpo(Law):
    """Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6).

        loss = -log s(beta (log p(w | x) / |w| - log p(l | x) / |l|) - gamma) + a NLL(w)

    It has no reference; log-probabilities are means over tokens, so that length earns nothing.
    sft_weight a is the variant of the paper's appendix with a supervised term.
    """

    has_reference = False
    beta: Positive = 2.0
    gamma: Weight = 1.0
    sft_weight: Weight = 0.0

    def loss(self, scored: Scored) -> Tensor:
        loss = -F.logsigmoid(self.beta * (scored.means[:, 0] - scored.means[:, 1]) - self.gamma)
        return loss + self.sft_weight * scored.nll if self.sft_weight else loss


@algorithm
class Kto(Law):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8), for
    completions that are judged one by one.

        loss = w_d (1 - s(beta (r(y) - z)))        y desirable
               w_u (1 - s(beta (z - r(y))))        y undesirable
        z    = max(0, mean of r over the mismatched completions of the step), without gradient

    Column 0 has the completion, column 1 that of another prompt, on which z is measured.
    """

    kind = JUDGED
    trained = 1
    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0

    def loss(self, scored: Scored) -> Tensor:
        assert scored.desirable is not None
        assert scored.mismatched is not None
        total, n = scored.mismatched
        z = (total / n).clamp(min=0)
        sign = torch.where(scored.desirable, 1.0, -1.0)
        weight = torch.where(scored.desirable, self.desirable_weight, self.undesirable_weight)
        return weight * (1 - torch.sigmoid(self.beta * sign * (scored.ratios[:, 0] - z)))


@algorithm
class BradleyTerry(Law):
    """A reward model of the preferences (Bradley and Terry 1952; Ouyang et al. 2022, arXiv
    2203.02155, eq. 1).

        loss = -log s(r(w) - r(l) - margin) + centre (r(w) + r(l))^2

    r is the score that a head gives the whole text, in place of log p. With a margin a pair counts
    as told apart only from that difference on (Touvron et al. 2023, arXiv 2307.09288, eq. 2).
    Differences leave the level of scores open; centre > 0 holds it at 0 (Eisenstein et al. 2023,
    arXiv 2312.09244), so that scores of different prompts compare; TRL recommends 0.01.
    """

    has_reference = False
    reads_head = True
    pace = 0.3  # the head is new, and has to be learned
    margin: Weight = 0.0
    centre: Weight = 0.0

    def loss(self, scored: Scored) -> Tensor:
        chosen, rejected = scored.logps.unbind(1)
        loss = -F.logsigmoid(chosen - rejected - self.margin)
        return loss + self.centre * (chosen + rejected).square() if self.centre else loss

    def rewards(self, scored: Scored) -> Tensor:
        return scored.logps
