"""The laws of policies: each with its equation, its paper and its options.

Of a prompt the policy drew a group of completions y, and each got a reward r. Of a token y_t are
given its log-probability under the policy that trains, under the one that drew it, and under the
reference, which never moves:

    w_t = pi(y_t | y_<t) / pi_drawn(y_t | y_<t)        its ratio
    A   = (r - baseline) / scale                       the advantage of its completion
    KL_t = e^d - d - 1,   d = log ref(y_t) - log pi(y_t)       k3, Schulman 2020

A loss is that of each token, in nats; `average` says what they are averaged over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lorafold.training_step.preference_algorithms import Positive, Weight, algorithm

Share = Annotated[float, Field(gt=0, lt=1)]
Scale = Literal["group", "batch", "none"]  # whose deviation advantages are divided by
TINY = 1e-4  # beside a standard deviation, which may be 0

# What losses of tokens are averaged over: the tokens of the step; the tokens of a completion, then
# completions; completions, of sums; completions, of sums over the most tokens of one
Average = Literal["tokens", "per-sequence", "sums", "longest"]


class SampledTokens(NamedTuple):
    """The n tokens of k completions: log-probabilities (n,) in nats under the policy, the one that
    sampled them and the reference (None: it has no part), the advantage (n,) of the completion, and
    which completion (n,), from 0 to k - 1, a token is of.
    """

    logps: Tensor
    sampled: Tensor
    reference: Tensor | None
    advantages: Tensor
    of: Tensor

    @property
    def ratios(self) -> Tensor:
        """w (n,)."""
        return (self.logps - self.sampled).exp()

    @property
    def kl(self) -> Tensor:
        """KL (n,) to the reference, estimated from the sampled token."""
        assert self.reference is not None
        d = self.reference - self.logps
        return d.exp() - d - 1

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x (n,) over the completion of each token, (n,)."""
        k = int(self.of.max()) + 1 if len(self.of) else 0
        sums = x.new_zeros(k).index_add(0, self.of, x)
        counts = x.new_zeros(k).index_add(0, self.of, torch.ones_like(x))
        return (sums / counts.clamp(min=1))[self.of]


def deviation(x: Tensor) -> Tensor:
    """The standard deviation (n, 1) of the numbers in each row of x (n, k), NaN left out."""
    squares = (x - x.nanmean(1, keepdim=True)).square()
    n = (~x.isnan()).sum(1, keepdim=True)
    return (squares.nansum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()


@algorithm
class PolicyLaw(ABC):
    """Abstract: one law over completions that the policy drew.

    With beta > 0 w_t KL_t, the KL to the reference, is added to the loss of each token. The ratio
    makes its gradient that of the KL itself, also where it is 1 (DeepSeek-V3.2 2025, arXiv
    2512.02556, eq. 7).
    """

    pace: ClassVar[float] = 0.25  # of a method's own learning rates
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
        """Whether the loss of each token has no gradient, since its ratio went too far, (n,)."""
        return torch.zeros_like(tokens.logps, dtype=torch.bool)

    def baseline(self, rewards: Tensor) -> Tensor:
        """The mean reward of each group, which is subtracted from rewards (groups, k)."""
        return rewards.nanmean(1, keepdim=True)

    def advantages(self, rewards: Tensor) -> Tensor:
        """The advantages (groups, k) of rewards (groups, k). A NaN reward is ignored and gets an
        advantage of 0, as does a reward that is alone in its group.
        """
        advantages = rewards - self.baseline(rewards)
        if self.scale == "group":
            advantages = advantages / (deviation(rewards) + TINY)
        elif self.scale == "batch":
            advantages = advantages / (deviation(rewards.view(1, -1)) + TINY)
        return advantages.where(~advantages.isnan(), 0.0)


@algorithm
class Reinforce(PolicyLaw):
    """The policy gradient (Williams 1992, Machine Learning 8, theorem 1), with the mean of the
    group as the baseline.

        loss_t = -A log pi(y_t)
    """

    def surrogate(self, tokens: SampledTokens) -> Tensor:
        return -tokens.advantages * tokens.logps


@algorithm
class Rloo(Reinforce):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7): the baseline is the
    mean of the group's other completions, and a completion is one action.
    """

    average: Average = "sums"

    def baseline(self, rewards: Tensor) -> Tensor:
        others = (~rewards.isnan()).sum(1, keepdim=True) - 1
        return (rewards.nansum(1, keepdim=True) - rewards) / others


@algorithm
class Ppo(PolicyLaw):
    """The clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with the mean of the
    group in place of a learned value, over the deviation of the batch.

        loss_t = -min(w_t A, clip(w_t, 1 - clip, 1 + clip_high) A)

    clip_high is clip unless it is given; DAPO has 0.28 (Yu et al. 2025, arXiv 2503.14476, eq. 10).
    """

    scale: Scale = "batch"
    clip: Share = 0.2
    clip_high: Positive | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest ratio."""
        return 1 - self.clip, 1 + (self.clip if self.clip_high is None else self.clip_high)

    def ratios(self, tokens: SampledTokens) -> Tensor:
        """The ratio of each token, (n,)."""
        return tokens.ratios

    def surrogate(self, tokens: SampledTokens) -> Tensor:
        w, a = self.ratios(tokens), tokens.advantages
        return -torch.minimum(w * a, w.clamp(*self.bounds) * a)

    def clipped(self, tokens: SampledTokens) -> Tensor:
        w, a = self.ratios(tokens), tokens.advantages
        low, high = self.bounds
        return ((w < low) & (a < 0)) | ((w > high) & (a > 0))


@algorithm
class Grpo(Ppo):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, eq. 3): advantages
    over the deviation of the group. Tokens count alike, as in DAPO (Yu et al. 2025, arXiv
    2503.14476, eq. 8); the paper's own mean is `average=per-sequence`, and `average=longest` with
    `scale=none` is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).
    """

    scale: Scale = "group"


@algorithm
class Gspo(Grpo):
    """Group sequence policy optimization (Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7): one
    ratio a completion, the geometric mean of its tokens'.
    """

    average: Average = "per-sequence"
    clip: Share = 3e-4
    clip_high: Positive | None = 4e-4

    def ratios(self, tokens: SampledTokens) -> Tensor:
        return tokens.mean(tokens.logps - tokens.sampled).exp()


@algorithm
class Cispo(PolicyLaw):
    """Clipped weights of importance sampling (MiniMax 2025, arXiv 2506.13585, eq. 4 and 5): every
    token keeps its gradient, and its ratio, which has none, is bounded above.

        loss_t = -min(w_t, 1 + clip_high) A log pi(y_t)
    """

    scale: Scale = "group"
    clip_high: Positive = 4.0

    def surrogate(self, tokens: SampledTokens) -> Tensor:
        weight = tokens.ratios.detach().clamp(max=1 + self.clip_high)
        return -weight * tokens.advantages * tokens.logps
