"""The loss of policy training on sampled completions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.contexts import evaluating
from lorafold.data.branches import Branched
from lorafold.data.examples import NO_LOSS, Example
from lorafold.errors import LorafoldError
from lorafold.ops.host_tensors import send, send_all
from lorafold.runtime.processes import ALONE, Processes
from lorafold.training_step.lm_head_loss import at_labels, token_losses
from lorafold.training_step.policy_algorithms import PolicyLaw, SampledTokens
from lorafold.training_step.shared_prefix_loss import BranchedLoss
from lorafold.training_step.shared_prefixes import Branching, over

log = logging.getLogger(__name__)

# The largest mean difference of log-probabilities per token, in nats, for the same weights, by the
# bytes of the dtype: SmolLM2's rounding error is 6e-6 in fp32 and 0.034 in bf16
APART = {4: 1e-3, 2: 0.2}


@dataclass(frozen=True)
class Rollout(Branched):
    """The completions of one prompt; for each, its tokens' sampling `logprobs` (b,), its advantage,
    and whether it is `counted` in the loss.
    """

    logprobs: tuple[tuple[float, ...], ...] = ()
    advantages: tuple[float, ...] = ()
    counted: tuple[bool, ...] = ()

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        advantages: Sequence[float],
        counted: Sequence[bool],
    ) -> Rollout:
        """The completions of a prompt, as token ids."""
        branches = tuple(Example((prompt[-1], *ids), (NO_LOSS, *ids)) for ids in completions)
        return cls(
            tuple(prompt[:-1]), branches, logprobs=tuple(map(tuple, logprobs)),
            advantages=tuple(advantages), counted=tuple(counted),
        )  # fmt: skip


class StepRollouts(list[Rollout]):
    """The completions of one step, with sampling metrics; `silent` is the reason if no group has a
    signal.
    """

    def __init__(
        self,
        groups: Iterable[Rollout],
        silent: str,
        figures: Mapping[str, float],
        tokens: int,
        seconds: Mapping[str, float],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__(groups)
        self.silent, self.figures = silent, figures
        self.tokens, self.seconds, self.samples = tokens, seconds, samples


@dataclass
class StepStatistics:
    """Counts and sums over the tokens of a step."""

    tokens: int = 0  # in all updates
    compared: int = 0  # with the sampled log-probabilities, in the first update
    largest: float = 0.0
    difference: float = 0.0  # between training and sampling log-probabilities
    clipped: int = 0
    kl: float = 0.0

    @classmethod
    def of(cls, parts: Sequence[StepStatistics]) -> StepStatistics:
        sums = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(cls)}
        return cls(**(sums | {"largest": max(part.largest for part in parts)}))

    def figures(self, kl: bool) -> dict[str, float]:
        """Means over the tokens, and the largest difference; empty without tokens."""
        if not (n := self.tokens):
            return {}
        mismatch = {"mismatch": self.difference / self.compared, "largest mismatch": self.largest}
        return mismatch | {"clipped": self.clipped / n} | ({"KL": self.kl / n} if kl else {})


class Policy(BranchedLoss):
    """The loss of a policy algorithm in nats, summed over tokens or completions."""

    def __init__(
        self,
        model: nn.Module,
        law: PolicyLaw,
        how: Branching | None,
        pad_id: int,
        longest: int,
        exact: bool = False,
    ) -> None:
        super().__init__(model, how, pad_id)
        self.law, self.pace, self.longest, self.exact = law, law.pace, longest, exact
        self.seen, self.at, self.inexact = StepStatistics(), 0, False
        # log-probabilities (n,) of each micro-batch before the step's first update, under the
        # policy and the reference (None if unused)
        self.first = list[tuple[Tensor, Tensor | None]]()
        # fp32 factors on a 16-bit base receive rounded activations
        size = min(p.element_size() for p in model.parameters() if p.is_floating_point())
        self.bound = APART.get(size, APART[2])

    def count(self, example: Rollout) -> int:
        if self.law.average == "tokens":
            counted = zip(example.logprobs, example.counted, strict=True)
            return sum(len(logprobs) for logprobs, counts in counted if counts)
        return sum(example.counted)

    def learns(self, example: Rollout) -> bool:
        given = zip(example.advantages, example.counted, strict=True)
        return any(counts and (advantage or self.law.beta > 0) for advantage, counts in given)

    def collate(self, examples: Sequence[Rollout], device: torch.device) -> dict[str, Tensor]:
        """The tensors of `laid_out`, with `drawn` (n,), the sampling log-probability of each token,
        and `advantages` and `weights` (k,) of each completion.
        """
        inputs = self.laid_out(examples)
        logprobs = torch.tensor([p for e in examples for own in e.logprobs for p in own])
        inputs["drawn"] = logprobs[self.order(examples)]
        inputs["advantages"] = torch.tensor([a for e in examples for a in e.advantages])
        lengths = torch.tensor([len(own) for e in examples for own in e.logprobs])
        over = {"per-sequence": lengths, "longest": torch.full_like(lengths, self.longest)}
        counted = torch.tensor([counts for e in examples for counts in e.counted])
        inputs["weights"] = counted / over.get(self.law.average, torch.ones_like(lengths))
        return send_all(inputs, device)

    def begin(self, update: int) -> None:
        """Start update number `update` on a step's examples; ratios are relative to update 0."""
        self.at = 0
        if not update:
            self.first = []

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The loss in nats, (); arguments from `collate`."""
        document, lens = inputs.pop("document"), inputs.pop("lens", None)
        drawn, advantages, weights = map(inputs.pop, ("drawn", "advantages", "weights"))

        def compute() -> Tensor:
            with over(self.how, lens, labels.device):
                return -token_losses(self.model, labels, inputs, self.exact)

        def compute_reference() -> Tensor:
            with evaluating(self), torch.no_grad(), self.below():
                return compute()

        logps = compute()
        of = send(at_labels(document, labels), logps.device)
        if self.at == len(self.first):
            self._compare(logps.detach(), drawn, compute_reference)
            reference = compute_reference() if self.law.beta else None
            self.first.append((logps.detach(), reference))
        tokens = SampledTokens(logps, *self.first[self.at], advantages[of], of)
        self.at += 1
        self.seen.tokens += len(logps)
        self.seen.clipped += int(self.law.clipped(tokens).sum())
        if tokens.reference is not None:
            self.seen.kl += float(tokens.kl.detach().sum())
        return (self.law.loss(tokens) * weights[of]).sum()

    def figures(self, processes: Processes = ALONE) -> dict[str, float]:
        statistics, self.seen = StepStatistics.of(processes.gather(self.seen)), StepStatistics()
        return statistics.figures(bool(self.law.beta))

    def _compare(self, logps: Tensor, sampled: Tensor, reference: Callable[[], Tensor]) -> None:
        """Raise if sampling and training log-probabilities differ by more than rounding: the
        weights differ.
        """
        if not len(logps):
            return
        difference = (logps - sampled).abs()
        self.seen.compared += len(difference)
        self.seen.difference += float(difference.sum())
        self.seen.largest = max(self.seen.largest, float(difference.max()))
        if self.exact and self.seen.largest and not self.inexact:
            self.inexact = True
            log.warning(
                "exact: sampling and training log-probabilities differ by %.3g: MoE experts, short"
                " sliding windows and logit soft-capping use another summation order",
                self.seen.largest,
            )
        if (mean := float(difference.mean())) <= self.bound:
            return
        by = "other weights (another step, adapter or base)"
        if float((reference() - sampled).abs().mean()) <= self.bound:
            by = "the model without the trained adapter"
        raise LorafoldError(
            f"completions were sampled by {by}: sampling and training log-probabilities differ by"
            f" {mean:.3g} per token, expected at most {self.bound:g}"
        )
