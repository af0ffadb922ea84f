"""Policy gradient algorithms. A token y_t of a sampled completion with reward r has

    w_t = pi(y_t | y_<t) / pi_sampled(y_t | y_<t)      the importance ratio
    A   = (r - baseline) / scale                       the advantage of its completion
    KL_t = e^d - d - 1,   d = log ref(y_t) - log pi(y_t)       k3, Schulman 2020

Losses are per token, in nats; `average` selects how they are averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lorafold.training_step.preference_algorithms import Positive, Weight, validated_dataclass

Share = Annotated[float, Field(gt=0, lt=1)]
Scale = Literal["group", "batch", "none"]  # whose standard deviation divides advantages
TINY = 1e-4  # added to a standard deviation, which may be 0

# tokens: the mean of the token losses of the step. The others are means over completions: of the
# mean loss of a completion (per-sequence), of its summed loss (sums), and of its summed loss
# divided by the maximum completion length (longest).
Average = Literal["tokens", "per-sequence", "sums", "longest"]


class SampledTokens(NamedTuple):
    """The n tokens of k completions: log-probabilities (n,) in nats under the policy, the sampling
    policy and the reference policy, the advantage (n,), and the index (n,) of the token's
    completion.
    """

    logps: Tensor
    sampled: Tensor
    reference: Tensor | None
    advantages: Tensor
    of: Tensor

    @property
    def ratios(self) -> Tensor:
        """The importance ratios w, (n,)."""
        return (self.logps - self.sampled).exp()

    @property
    def kl(self) -> Tensor:
        """The KL (n,) to the reference policy, estimated from each sampled token."""
        assert self.reference is not None
        d = self.reference - self.logps
        return d.exp() - d - 1

    def total(self, x: Tensor) -> Tensor:
        """For each token, the sum (n,) of x (n,) over its completion."""
        k = int(self.of.max()) + 1 if len(self.of) else 0
        return x.new_zeros(k).index_add(0, self.of, x)[self.of]

    @property
    def lengths(self) -> Tensor:
        """The number of tokens (n,) of each token's completion."""
        return self.total(torch.ones_like(self.logps))


def deviation(x: Tensor) -> Tensor:
    """The standard deviation (n, 1) of each row of x (n, k), ignoring NaN."""
    squares = (x - x.nanmean(1, keepdim=True)).square()
    n = (~x.isnan()).sum(1, keepdim=True)
    return (squares.nansum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()


@validated_dataclass
class PolicyAlgorithm(ABC):
    """Base class of policy gradient algorithms.

    With beta > 0, beta w_t KL_t is added to the loss of each token. Because of the factor w_t, this
    term has the gradient of the KL, even if w_t is 1 (DeepSeek-V3.2 2025, arXiv 2512.02556, eq. 7).
    """

    pace: ClassVar[float] = 0.25  # factor on a method's learning rates
    beta: Weight = 0.0
    average: Average = "tokens"
    scale: Scale = "none"

    @abstractmethod
    def surrogate(self, tokens: SampledTokens) -> Tensor:
        """The loss of each token without the KL, (n,)."""

    def loss(self, tokens: SampledTokens) -> Tensor:
        """The loss of each token, (n,), in nats."""
        loss = self.surrogate(tokens)
        return loss + self.beta * tokens.ratios * tokens.kl if self.beta else loss

    def clipped(self, tokens: SampledTokens) -> Tensor:
        """Whether each token, (n,), has no gradient because its importance ratio was clipped."""
        return torch.zeros_like(tokens.logps, dtype=torch.bool)

    def baseline(self, rewards: Tensor) -> Tensor:
        """The baseline that is subtracted from rewards (groups, k): the mean of each group,
        (groups, 1).
        """
        return rewards.nanmean(1, keepdim=True)

    def advantages(self, rewards: Tensor) -> Tensor:
        """The advantages (groups, k) of rewards (groups, k). The advantage is 0 if the reward is
        NaN, or is the only reward of its group.
        """
        advantages = rewards - self.baseline(rewards)
        if self.scale == "group":
            advantages = advantages / (deviation(rewards) + TINY)
        elif self.scale == "batch":
            advantages = advantages / (deviation(rewards.view(1, -1)) + TINY)
        return advantages.where(~advantages.isnan(), 0.0)


@validated_dataclass
class Reinforce(PolicyAlgorithm):
    """The policy gradient (Williams 1992, Machine Learning 8, theorem 1), with the mean reward of
    the group as the baseline.

        loss_t = -A log pi(y_t)
    """

    def surrogate(self, tokens: SampledTokens) -> Tensor:
        return -tokens.advantages * tokens.logps


@validated_dataclass
class Ppo(PolicyAlgorithm):
    """The clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7). The baseline is the
    mean reward of the group instead of a learned value, and advantages are divided by the standard
    deviation of the batch.

        loss_t = -min(w_t A, clip(w_t, 1 - clip, 1 + clip_high) A)

    clip_high defaults to clip; DAPO uses 0.28 (Yu et al. 2025, arXiv 2503.14476, eq. 10).
    """

    scale: Scale = "batch"
    clip: Share = 0.2
    clip_high: Positive | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest importance ratio that are not clipped."""
        return 1 - self.clip, 1 + (self.clip if self.clip_high is None else self.clip_high)

    def ratios(self, tokens: SampledTokens) -> Tensor:
        """The importance ratio of each token, (n,)."""
        return tokens.ratios

    def surrogate(self, tokens: SampledTokens) -> Tensor:
        w, a = self.ratios(tokens), tokens.advantages
        return -torch.minimum(w * a, w.clamp(*self.bounds) * a)

    def clipped(self, tokens: SampledTokens) -> Tensor:
        w, a = self.ratios(tokens), tokens.advantages
        low, high = self.bounds
        return ((w < low) & (a < 0)) | ((w > high) & (a > 0))


@validated_dataclass
class Grpo(Ppo):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, eq. 3): advantages
    are divided by the standard deviation of the group. All tokens have equal weight, as in DAPO (Yu
    et al. 2025, arXiv 2503.14476, eq. 8). `average=per-sequence` is the paper's mean;
    `average=longest` with `scale=none` is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).
    """

    scale: Scale = "group"


@validated_dataclass
class Gspo(Grpo):
    """Group sequence policy optimization (Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7): the
    importance ratio of a completion is the geometric mean of its tokens' ratios.
    """

    average: Average = "per-sequence"
    clip: Share = 3e-4
    clip_high: Positive | None = 4e-4

    def ratios(self, tokens: SampledTokens) -> Tensor:
        return (tokens.total(tokens.logps - tokens.sampled) / tokens.lengths).exp()


@validated_dataclass
class Rloo(Ppo):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7): the baseline is the
    mean reward of the group's other completions, and a completion is one action. After the first
    update, the importance ratio of a completion is clipped, as in TRL.
    """

    average: Average = "sums"
    scale: Scale = "none"

    def baseline(self, rewards: Tensor) -> Tensor:
        others = (~rewards.isnan()).sum(1, keepdim=True) - 1
        return (rewards.nansum(1, keepdim=True) - rewards) / others

    def ratios(self, tokens: SampledTokens) -> Tensor:
        return tokens.total(tokens.logps - tokens.sampled).exp()

    def surrogate(self, tokens: SampledTokens) -> Tensor:
        return super().surrogate(tokens) / tokens.lengths


@validated_dataclass
class Cispo(PolicyAlgorithm):
    """Clipped importance sampling weights (MiniMax 2025, arXiv 2506.13585, eq. 4 and 5): every
    token keeps its gradient, and its importance ratio is detached and bounded above.

        loss_t = -min(w_t, 1 + clip_high) A log pi(y_t)
    """

    scale: Scale = "group"
    clip_high: Positive = 4.0

    def surrogate(self, tokens: SampledTokens) -> Tensor:
        weight = tokens.ratios.detach().clamp(max=1 + self.clip_high)
        return -weight * tokens.advantages * tokens.logps
