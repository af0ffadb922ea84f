"""Preference losses. A row has log p(y | x), in nats and summed over tokens, for the chosen
completion w (column 0) and the rejected completion l (column 1).

    r(y) = log p(y | x) - log p_ref(y | x)            the implicit reward divided by beta
    |y|                                               the number of tokens of y
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeVar, dataclass_transform

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
EXO_SMOOTHING = 1e-3  # the paper's value


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def validated_dataclass(cls: type[T]) -> type[T]:
    """Class decorator for frozen dataclasses whose options pydantic validates."""
    return dataclass(frozen=True, config=STRICT)(cls)  # type: ignore[return-value]


class Scored(NamedTuple):
    """The inputs of a preference loss for n rows: log-probabilities (n, 2) in nats under the model
    and the reference, the number of tokens (n, 2) of each completion, and whether single
    completions are desirable (n,). For losses that read a head, `logps` are its scores.
    `mismatched` is the step's `ratio_sums` of mismatched completions; if it is given, column 1,
    which has these completions, may be absent.
    """

    logps: Tensor
    reference: Tensor | None
    tokens: Tensor
    desirable: Tensor | None = None
    mismatched: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """The log-ratios r (n, 2), or log p without a reference."""
        return self.logps if self.reference is None else self.logps - self.reference

    @property
    def margins(self) -> Tensor:
        """The margins d = r(w) - r(l), (n,)."""
        return self.ratios[:, 0] - self.ratios[:, 1]

    @property
    def means(self) -> Tensor:
        """The mean log p per token, (n, 2)."""
        return self.logps / self.tokens

    @property
    def nll(self) -> Tensor:
        """The supervised loss of the first completion, in nats per token, (n,)."""
        return -self.means[:, 0]


def ratio_sums(ratios: Tensor) -> Tensor:
    """The sum of the log-ratios r, in nats, and their number, (2,), which can be added over parts
    of a step.
    """
    return torch.stack([ratios.sum(), ratios.new_tensor(float(ratios.numel()))])


class Law(ABC):
    """Base class of preference losses."""

    kind: ClassVar[str] = PAIRS  # the kind of rows
    has_reference: ClassVar[bool] = True
    reads_head: ClassVar[bool] = False  # uses a head's scores instead of log-probabilities
    trained: ClassVar[int] = 2  # completions of a row with gradients; the others are mismatched
    # factor on a method's learning rates: a model separates the completions of pairs long before it
    # learns them
    pace: ClassVar[float] = 0.05
    beta: float  # an option of every loss with implicit rewards

    @abstractmethod
    def loss(self, scored: Scored) -> Tensor:
        """The loss of each row, (n,), in nats."""

    def rewards(self, scored: Scored) -> Tensor:
        """The implicit rewards of both completions, (n, 2)."""
        return self.beta * (scored.ratios if self.has_reference else scored.means)


@validated_dataclass
class Dpo(Law):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

        loss = -(1 - e) log s(beta d) - e log s(-beta d) + a NLL(w),      d = r(w) - r(l)

    s is the logistic function. label_smoothing e > 0 is cDPO (Mitchell 2023), which assumes that a
    share e of the labels is wrong. sft_weight a > 0 adds the supervised loss of the chosen
    completion (Pang et al. 2024, arXiv 2404.19733, eq. 1), which keeps its probability from
    falling.

    loss_type=robust is unbiased under a share e of wrong labels (Chowdhury et al. 2024, arXiv
    2403.00409, eq. 9); exo is the reverse KL to smoothed labels, with e = 1e-3 unless it is set (Ji
    et al. 2024, arXiv 2402.00856, eq. 16):

        robust = (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)
        exo    = s(beta d) log(s(beta d) / (1 - e)) + s(-beta d) log(s(-beta d) / e)
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    loss_type: Literal["sigmoid", "robust", "exo"] = "sigmoid"
    sft_weight: Weight = 0.0

    def loss(self, scored: Scored) -> Tensor:
        margin, e = self.beta * scored.margins, self.label_smoothing
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        if self.loss_type == "exo":
            e = e or EXO_SMOOTHING
            loss = right.exp() * (right - log(1 - e)) + wrong.exp() * (wrong - log(e))
        elif self.loss_type == "robust":
            loss = (e * wrong - (1 - e) * right) / (1 - 2 * e)
        else:
            loss = -(1 - e) * right - e * wrong
        return loss + self.sft_weight * scored.nll if self.sft_weight else loss


@validated_dataclass
class Ipo(Law):
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036, eq. 17).

        loss = (d - 1 / (2 beta))^2,      d = r(w) / |w| - r(l) / |l|

    The margin has a finite target, so unanimous preferences do not drive it to infinity. Log-ratios
    are means over tokens, so that beta does not depend on length; with `per_token=False` they are
    sums, as in eq. 17.
    """

    beta: Positive = 0.1
    per_token: bool = True

    def loss(self, scored: Scored) -> Tensor:
        r = scored.ratios / scored.tokens if self.per_token else scored.ratios
        return (r[:, 0] - r[:, 1] - 1 / (2 * self.beta)).square()


@validated_dataclass
class Hinge(Law):
    """The hinge loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) on DPO's margin, as in Liu et al.
    2023, arXiv 2309.06657, eq. 13.

        loss = max(0, 1 - beta d),      d = r(w) - r(l)
    """

    beta: Positive = 0.1

    def loss(self, scored: Scored) -> Tensor:
        return (1 - self.beta * scored.margins).relu()


@validated_dataclass
class Orpo(Law):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).

        loss = NLL(w) - beta log s(log odds(w) - log odds(l)),      odds(y) = p / (1 - p),
                                                                   log p = log p(y | x) / |y|

    ORPO needs no reference. Its loss includes the supervised loss, so it can replace supervised
    fine-tuning.
    """

    has_reference = False
    beta: Positive = 0.1

    def loss(self, scored: Scored) -> Tensor:
        means = scored.means.clamp(max=-1e-6)  # odds are infinite at p = 1
        odds = means - torch.log(-torch.expm1(means))
        return scored.nll - self.beta * F.logsigmoid(odds[:, 0] - odds[:, 1])


@validated_dataclass
class Simpo(Law):
    """Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6).

        loss = -log s(beta (log p(w | x) / |w| - log p(l | x) / |l|) - gamma) + a NLL(w)

    SimPO needs no reference. Means over tokens remove the effect of length. sft_weight a > 0 is the
    variant in the paper's appendix.
    """

    has_reference = False
    beta: Positive = 2.0
    gamma: Weight = 1.0
    sft_weight: Weight = 0.0

    def loss(self, scored: Scored) -> Tensor:
        loss = -F.logsigmoid(self.beta * (scored.means[:, 0] - scored.means[:, 1]) - self.gamma)
        return loss + self.sft_weight * scored.nll if self.sft_weight else loss


@validated_dataclass
class Kto(Law):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8), for
    completions that are judged individually.

        loss = w_d (1 - s(beta (r(y) - z)))        y desirable
               w_u (1 - s(beta (z - r(y))))        y undesirable
        z    = max(0, mean of r over the mismatched completions of the step), without gradient

    Column 0 holds the completion, column 1 a completion of another prompt, for z.
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


@validated_dataclass
class BradleyTerry(Law):
    """The loss of a reward model (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq.
    1).

        loss = -log s(r(w) - r(l) - margin) + centre (r(w) + r(l))^2

    r is the score of prompt and completion from a head. The margin is a minimum difference (Touvron
    et al. 2023, arXiv 2307.09288, eq. 2). centre > 0 keeps scores near 0 (Eisenstein et al. 2023,
    arXiv 2312.09244), so that scores of different prompts are comparable; TRL recommends 0.01.
    """

    has_reference = False
    reads_head = True
    pace = 0.3  # the head is randomly initialized
    margin: Weight = 0.0
    centre: Weight = 0.0

    def loss(self, scored: Scored) -> Tensor:
        chosen, rejected = scored.logps.unbind(1)
        loss = -F.logsigmoid(chosen - rejected - self.margin)
        return loss + self.centre * (chosen + rejected).square() if self.centre else loss

    def rewards(self, scored: Scored) -> Tensor:
        return scored.logps
