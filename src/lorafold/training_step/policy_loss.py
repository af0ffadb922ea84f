"""The policy gradient loss of sampled completions."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.contexts import evaluating
from lorafold.data.chat_template import prefix_of
from lorafold.data.examples import Example
from lorafold.data.preference_examples import BranchedRow
from lorafold.errors import LorafoldError
from lorafold.ops.host_tensors import send, send_all
from lorafold.runtime.processes import SINGLE_PROCESS, Processes
from lorafold.training_step.branched_loss import BranchedLoss
from lorafold.training_step.lm_head_loss import at_labels, token_losses
from lorafold.training_step.policy_algorithms import PolicyAlgorithm, SampledTokens
from lorafold.training_step.shared_prefixes import PrefixSupport, document_layout

log = logging.getLogger(__name__)

# The largest accepted mean difference, in nats per token, between sampling and training
# log-probabilities, by the bytes of the dtype. For SmolLM2, rounding error causes 6e-6 in fp32 and
# 0.034 in bf16.
MAX_LOGPROB_DIFFERENCE = {4: 1e-3, 2: 0.2}


@dataclass(frozen=True)
class Rollout(BranchedRow):
    """The completions of one prompt. Each has the `logprobs` (b,) of its tokens under the sampling
    policy, an advantage, and whether it is `counted` in the loss.
    """

    logprobs: tuple[tuple[float, ...], ...] = ()
    advantages: tuple[float, ...] = ()
    counted: tuple[bool, ...] = ()

    @classmethod
    def of(
        cls, documents: Sequence[Example], prompt: int, logprobs: Sequence[Sequence[float]],
        advantages: Sequence[float], counted: Sequence[bool],
    ) -> Rollout:
        """A rollout of documents, whose first `prompt` tokens may be shared. Each branch begins
        with the last shared token, because it predicts the first sampled one.
        """
        n = len(prefix_of(*(one.ids[:prompt] for one in documents))) - 1
        branches = tuple(Example(one.ids[n:], one.labels[n:]) for one in documents)
        return cls(
            documents[0].ids[:n], branches, logprobs=tuple(map(tuple, logprobs)),
            advantages=tuple(advantages), counted=tuple(counted),
        )  # fmt: skip


class StepRollouts(list[Rollout]):
    """The completions of one step, with sampling metrics; `no_signal_reason` is empty if any group
    has a learning signal.
    """

    def __init__(
        self, groups: Iterable[Rollout], no_signal_reason: str, figures: Mapping[str, float],
        tokens: int, seconds: Mapping[str, float], samples: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__(groups)
        self.no_signal_reason, self.figures = no_signal_reason, figures
        self.tokens, self.seconds, self.samples = tokens, seconds, samples


@dataclass
class StepStatistics:
    """Counts and sums over the tokens of a step."""

    tokens: int = 0  # in all updates
    compared: int = 0  # the tokens of the first update, which are compared with sampling
    largest: float = 0.0
    difference: float = 0.0  # the sum, between training and sampling log-probabilities
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
        self, model: nn.Module, algorithm: PolicyAlgorithm, support: PrefixSupport | None,
        pad_id: int, max_new_tokens: int, exact: bool = False, temperature: float = 1.0,
    ) -> None:
        super().__init__(model, support, pad_id)
        self.temperature, self.entropy, self.entropy_weight = temperature, 0.0, 0.0
        self.algorithm, self.pace = algorithm, algorithm.pace
        self.max_new_tokens, self.exact, self.has_warned = max_new_tokens, exact, False
        self.statistics, self.micro_batch, self.mini_batch = StepStatistics(), 0, 0
        # log-probabilities (n,) of each micro-batch of a mini-batch before the step's first update,
        # under the policy and the reference (None if unused)
        self.initial_logps = defaultdict[int, list[tuple[Tensor, Tensor | None]]](list)
        # a 16-bit base rounds the inputs of fp32 adapters, so the smallest dtype decides
        size = min(p.element_size() for p in model.parameters() if p.is_floating_point())
        self.max_difference = MAX_LOGPROB_DIFFERENCE.get(size, MAX_LOGPROB_DIFFERENCE[2])

    def count(self, example: Rollout) -> int:
        if self.algorithm.average == "tokens":
            counted = zip(example.logprobs, example.counted, strict=True)
            return sum(len(logprobs) for logprobs, counts in counted if counts)
        return sum(example.counted)

    def learns(self, example: Rollout) -> bool:
        pairs = zip(example.advantages, example.counted, strict=True)
        regularized = self.algorithm.beta > 0 or self.entropy_weight > 0
        return any(counts and (advantage or regularized) for advantage, counts in pairs)

    def collate(self, examples: Sequence[Rollout], device: torch.device) -> dict[str, Tensor]:
        """The tensors of `layout_tensors`; `sampled_logps` (n,), the sampling log-probability of
        each token; and `advantages` and `weights` (k,) of the completions.
        """
        inputs = self.layout_tensors(examples)
        logprobs = torch.tensor([p for e in examples for own in e.logprobs for p in own])
        inputs["sampled_logps"] = logprobs[self.order(examples)]
        inputs["advantages"] = torch.tensor([a for e in examples for a in e.advantages])
        lengths = torch.tensor([len(own) for e in examples for own in e.logprobs])
        sizes = {"per-sequence": lengths, "longest": torch.full_like(lengths, self.max_new_tokens)}
        counted = torch.tensor([counts for e in examples for counts in e.counted])
        inputs["weights"] = counted / sizes.get(self.algorithm.average, torch.ones_like(lengths))
        return send_all(inputs, device)

    def begin(self, update: int, mini_batch: int = 0) -> None:
        """Starts an update of a step with one of its mini-batches; importance ratios are relative
        to the weights before the step.
        """
        self.micro_batch, self.mini_batch = 0, mini_batch
        if not update:
            self.initial_logps[mini_batch] = []

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The loss in nats, (), of the tensors from `collate`."""
        document, lens = inputs.pop("document"), inputs.pop("lens", None)
        sampled, advantages, weights = map(inputs.pop, ("sampled_logps", "advantages", "weights"))

        def compute() -> Tensor:
            with document_layout(self.support, lens, labels.device):
                return -token_losses(self.model, labels, inputs, self.exact, self.temperature)

        def compute_reference() -> Tensor:
            with evaluating(self), torch.no_grad(), self.below():
                return compute()

        logps = compute()
        of = send(at_labels(document, labels), logps.device)
        initial = self.initial_logps[self.mini_batch]
        if self.micro_batch == len(initial):
            if not self.mini_batch:  # later ones begin with other weights than those of sampling
                self._compare(logps.detach(), sampled, compute_reference)
                sampled = logps.detach()
            initial.append((sampled, compute_reference() if self.algorithm.beta else None))
        tokens = SampledTokens(logps, *initial[self.micro_batch], advantages[of], of)
        self.micro_batch += 1
        self.statistics.tokens += len(logps)
        self.statistics.clipped += int(self.algorithm.clipped(tokens).sum())
        if tokens.reference is not None:
            self.statistics.kl += float(tokens.kl.detach().sum())
        loss = self.algorithm.loss(tokens)
        if self.entropy_weight:  # the gradient of the entropy, estimated from the samples
            loss = loss + self.entropy_weight * tokens.ratios * (logps.detach() + self.entropy)
        return (loss * weights[of]).sum()

    def figures(self, processes: Processes = SINGLE_PROCESS) -> dict[str, float]:
        own, self.statistics = self.statistics, StepStatistics()
        return StepStatistics.of(processes.gather(own)).figures(bool(self.algorithm.beta))

    def _compare(self, logps: Tensor, sampled: Tensor, reference: Callable[[], Tensor]) -> None:
        """Raises if sampling and training log-probabilities differ by more than rounding error,
        which means that other weights sampled the completions.
        """
        if not len(logps):
            return
        difference, statistics = (logps - sampled).abs(), self.statistics
        statistics.compared += len(difference)
        statistics.difference += float(difference.sum())
        statistics.largest = max(statistics.largest, float(difference.max()))
        if self.exact and statistics.largest and not self.has_warned:
            self.has_warned = True
            log.warning(
                "exact: sampling and training log-probabilities differ by %.3g: MoE experts, short"
                " sliding windows, logit soft-capping and some CPUs change the summation order",
                statistics.largest,
            )
        if (mean := float(difference.mean())) <= self.max_difference:
            return
        sampler = "other weights (another step, adapter or base)"
        if float((reference() - sampled).abs().mean()) <= self.max_difference:
            sampler = "the model without the trained adapter"
        raise LorafoldError(
            f"completions were sampled by {sampler}: sampling and training log-probabilities differ"
            f" by {mean:.3g} per token, expected at most {self.max_difference:g}"
        )
