"""Policy objectives: the model generates completions and learns from their rewards.

The samples depend only on the weights, the run's seed and the step, so a resumed run is exact.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.console import Console

from lorafold.core.contexts import undropped
from lorafold.data.arrow import lengths_of
from lorafold.data.batches import BatchFeed, StoredFeed
from lorafold.data.examples import WHOLE
from lorafold.data.formats import PROMPTS
from lorafold.data.prompts import PromptEncoder, TokenizedPrompt, prompt_data
from lorafold.data.render import Rendering
from lorafold.data.row_store import Rows
from lorafold.data.rows import as_checked
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoded, Encoder
from lorafold.errors import LorafoldError, RewardFailed
from lorafold.evaluation import Measured, RewardEvaluation, RewardSettings, evaluate_rewards
from lorafold.evaluation.policy import Rewarded
from lorafold.evaluation.reward_adapter import RewardAdapter, rewards_over
from lorafold.evaluation.rollouts import HELD_OUT, SLOTS, Completion, Rollouts, RolloutSize
from lorafold.files.model_card import JUDGED_BY
from lorafold.files.templates import within
from lorafold.files.terminal import print_lines
from lorafold.objectives import Declared
from lorafold.objectives.objective import ObjectiveRequest, OnPolicy, Packing
from lorafold.objectives.options import SamplingOptions, law_class, policy_options
from lorafold.ops.arithmetic import override_widening, widens
from lorafold.ops.dropout import key_of
from lorafold.rewards import RewardName, Rewards
from lorafold.rewards.reward import REWARDS
from lorafold.runtime.processes import ALONE, Processes
from lorafold.training_step import policy_algorithms
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.policy_algorithms import PolicyLaw
from lorafold.training_step.policy_loss import Policy, Rollout, StepRollouts
from lorafold.training_step.shared_prefixes import Branching, branching

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HIGHEST, LOWEST = "highest reward", "lowest reward"  # of all completions so far
SILENT = "lowest reward since a signal"  # of completions since the last step with a signal
LARGEST = 1e12  # the largest advantage: squared gradients must not overflow fp32
COLLAPSED = 0.1  # nats per token: below it nearly all completions of a prompt are the same
SOLVED = "the rows are solved, unless the reward can be higher; try harder rows"
TRY = (
    "the prompts are too hard or too easy for the model; try easier rows, a reward with partial"
    " credit, or more completions per prompt (group, fill)",
    "the policy has collapsed; try a lower learning rate, beta, or more prompts per step (batch)"
    " and completions per prompt (group)",
)  # by whether it has collapsed


class RolloutLoss(Policy):
    """The loss of a policy, with its sampling engine and rewards."""

    def __init__(
        self,
        model: PreTrainedModel,
        law: PolicyLaw,
        how: Branching | None,
        pad_id: int,
        rollouts: Rollouts,
        rewards: Rewards,
    ) -> None:
        super().__init__(model, law, how, pad_id, rollouts.longest, rollouts.exact)
        self.rollouts, self.rewards = (rollouts,), rewards  # a tuple, so not a submodule
        self.processes: Processes = ALONE  # set by `refer`


@dataclass(frozen=True)
class PolicyObjective(OnPolicy):
    """Reinforcement learning from rewards."""

    law: PolicyLaw
    sampling: SamplingOptions
    functions: tuple[Callable[..., Any], ...] = ()  # rewards in Python
    seed: int = 0
    adapters: Mapping[str, RewardAdapter] = field(default_factory=dict)  # by reward name

    @classmethod
    def of(cls, request: ObjectiveRequest) -> Self:
        law, drawing = policy_options(request.name, request.beta, request.options)
        if not (drawing.rewards or request.rewards):
            raise LorafoldError(
                f"objective {request.name}: found no reward, expected at least one: --reward"
                " FILE.py:FUNCTION, or rewards= in Python"
            )
        parsed = {text: RewardName.parse(text) for text in drawing.rewards}
        adapters = {
            text: RewardAdapter.of(name, request.base)
            for text, name in parsed.items()
            if name.is_adapter
        }
        return cls(law, drawing, tuple(request.rewards), request.seed, adapters)

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        kinds = (law_class(declared, policy_algorithms), SamplingOptions)
        return {field.name: field.default for kind in kinds for field in fields(kind)}

    @property
    def reads(self) -> Sequence[tuple[str, Path]]:  # type: ignore[override]
        """The adapters of reward models."""
        adapters = [(name, saved) for name, one in self.adapters.items() for saved in one.stack]
        return [(f"for --reward {name}", saved.path) for name, saved in adapters]

    @property
    def identity(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The digests of the rewards, by name."""
        # not repr, which may contain an address that differs between processes
        names = [getattr(fn, "__qualname__", type(fn).__qualname__) for fn in self.functions]
        files = {text: RewardName.parse(text).digest for text in self.sampling.rewards}
        files |= {name: one.identity for name, one in self.adapters.items()}
        return {REWARDS: files | dict.fromkeys(names, "")}

    def record(self) -> dict[str, Any]:
        named = {one.name: one.weight for one in map(RewardName.parse, self.sampling.rewards)}
        return {JUDGED_BY: named | (Rewards.of(*self.functions).weights if self.functions else {})}

    def guessing(self, labels: Mapping[str, int]) -> float:
        return math.inf  # a policy loss is not comparable

    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return PromptEncoder(tokenizer)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Encoded:
        return prompt_data(table, rows, max_length - self.sampling.max_new_tokens)

    def updates(
        self, examples: Sequence[Rollout], loss: RolloutLoss
    ) -> Iterator[Sequence[Rollout]]:
        for update in range(self.sampling.updates):
            loss.begin(update)
            yield examples

    def draws(self, feed: BatchFeed, held_out: Any) -> RolloutSize:
        assert isinstance(feed, StoredFeed)
        lengths = [*lengths_of(feed.examples), *(lengths_of(held_out.examples) if held_out else [])]
        slots = min(SLOTS, feed.batch * self.sampling.group)
        return RolloutSize(slots, self.sampling.group, max(lengths), self.sampling.max_new_tokens)

    def trained(self, example: TokenizedPrompt) -> Rollout:
        """A group of completions of that prompt, with the maximum length."""
        ids, k = (0,) * self.sampling.max_new_tokens, self.sampling.group
        return Rollout.of(example.ids, [ids] * k, [()] * k, [0.0] * k, [True] * k)

    def preview(self, example: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> Text:
        from rich.text import Text

        text = tokenizer.decode(list(example.ids), skip_special_tokens=False)
        return Text(str(text), style="dim")

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: Packing,
        console: Console,
    ) -> Iterator[RolloutLoss]:
        drawing = self.sampling
        with ExitStack() as stack:
            rewards = stack.enter_context(self._rewards(model, packing, console))
            rollouts = Rollouts(
                model, tokenizer, drawing.group, drawing.max_new_tokens, exact=drawing.exact
            )
            stack.callback(rollouts.close)
            if dropped := stack.enter_context(undropped(model)):
                dropout = f"dropout: {dropped:g} in the model or its adapters is set to 0"
                print_lines(console, f"{dropout}, because sampling uses no dropout")
            how = None
            if packing:
                how = stack.enter_context(branching(model, across=packing == "auto"))
            if drawing.exact and (how is None or not how.packs):
                raise LorafoldError(
                    "exact: found padded sequences, expected packed ones, as in sampling; turn"
                    " packing on, or train without exact"
                )
            if drawing.exact:  # also in the backward, for recomputed checkpoints
                stack.enter_context(override_widening(widened=widens(model.dtype), rows=1))
            yield RolloutLoss(model, self.law, how, tokenizer.pad_token_id or 0, rollouts, rewards)

    def refer(
        self, loss: RolloutLoss, feed: BatchFeed, held_out: Any, below: Sequence[str],
        console: Console, layout: Replicated,
    ) -> tuple[BatchFeed, Any]:
        """Open the engine for the longest prompt."""
        loss.processes = layout.processes
        size = self.draws(feed, held_out)
        if loss.rollouts[0].open(size.prompt, size.slots):
            reason = "exact: on this processor, matmuls depend on the number of rows, so some"
            print_lines(console, f"{reason} rounding differences remain")
        return feed, held_out

    def examples(
        self, step: int, planned: Sequence[TokenizedPrompt], loss: RolloutLoss
    ) -> StepRollouts:
        """The sampled groups for the planned prompts. As in TRL, groups with equal rewards count in
        the mean. Rank 0 computes all rewards, because other processes might get different ones.
        """
        return loss.processes.once(partial(self._rollouts, step, planned, loss))

    def _rollouts(
        self, step: int, planned: Sequence[TokenizedPrompt], loss: RolloutLoss
    ) -> StepRollouts:
        key, seconds, again = key_of(self.seed, step), defaultdict[str, float](float), 0
        judged = first = self._sample(planned, key, loss, seconds)
        tokens = first.tokens
        advantages, learns = self._advantages(judged)
        for attempt in range(1, self.sampling.fill + 1):
            if not (empty := (~learns).nonzero().flatten().tolist()):
                break
            more = self._sample([planned[i] for i in empty], key_of(key, attempt), loss, seconds)
            judged, again = judged.replaced(empty, more), again + len(empty)
            tokens += more.tokens
            advantages, learns = self._advantages(judged)
        figures = dict(first.figures)
        if self.sampling.fill:
            figures["groups drawn again"] = again / len(planned)
        silent = "" if bool(learns.any()) else self._silent(judged, loss)
        rollouts = [
            Rollout.of(
                prompt.ids, [one.tokens for one in group], [one.logprobs for one in group], row,
                [self._counts(one) for one in group],
            )
            for prompt, group, row in zip(planned, judged.groups, advantages.tolist(), strict=True)
        ]  # fmt: skip
        if not silent:
            loss.counts.pop(SILENT, None)
        elif not step:
            rollouts = []  # the policy still equals its reference, so the KL has no gradient
        return StepRollouts(rollouts, silent, figures, tokens, dict(seconds), first.to_read)

    def measure(self, loss: RolloutLoss, held_out: Encoded) -> Measured:
        """The mean reward of one completion of each prompt, always with the same random numbers,
        with its confidence interval; the loss is its negative.
        """
        rollouts, prompts = loss.rollouts[0], held_out.examples
        groups = rollouts.draw([prompt.ids for prompt in prompts], key_of(self.seed, HELD_OUT), 1)
        judged = Rewarded.of(prompts, groups, loss.rewards, at_once=SLOTS)
        reward, interval = judged.figures["reward"], judged.interval
        # a group of one never has a signal
        figures = {k: v for k, v in judged.figures.items() if k != "groups without signal"}
        text = f", reward {reward:.3f}{within(interval, '.3f')}"
        return Measured(-reward, figures | {"reward_interval": interval}, text, judged.to_read)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row],
        max_length: int,
    ) -> RewardEvaluation:  # fmt: skip
        """The rewards of completions, as many per prompt as in training, under the run's seed."""
        longest, k = self.sampling.max_new_tokens, self.sampling.group
        how = RewardSettings(max_length, longest, k, seed=self.seed)
        with self._rewards(model, "auto", Console(quiet=True)) as rewards:
            evaluation = evaluate_rewards(model, tokenizer, as_checked(rows, PROMPTS), rewards, how)
        if None in evaluation.prompt_rewards:
            row = evaluation.prompt_rewards.index(None) + 1
            raise LorafoldError(f"held-out row {row}: all rewards returned None, expected a number")
        return evaluation

    def _rewards(self, model: PreTrainedModel, packing: Packing, console: Console) -> Any:
        given: list[Any] = [*self.sampling.rewards, *self.functions]
        limit = self.sampling.reward_seconds
        return rewards_over(model, given, self.adapters, limit, packing, console)

    def _sample(
        self, prompts: Sequence[TokenizedPrompt], key: int, loss: RolloutLoss,
        seconds: dict[str, float],
    ) -> Rewarded:  # fmt: skip
        start = time.perf_counter()
        groups = loss.rollouts[0].draw([prompt.ids for prompt in prompts], key)
        sampled = time.perf_counter()
        judged = Rewarded.of(prompts, groups, loss.rewards)
        seconds["drawing"] += sampled - start
        seconds["judging"] += time.perf_counter() - sampled
        if rewards := judged.rewards[~judged.rewards.isnan()].tolist():
            loss.counts[HIGHEST] = max(loss.counts.get(HIGHEST, rewards[0]), *rewards)
            loss.counts[LOWEST] = min(loss.counts.get(LOWEST, rewards[0]), *rewards)
        return judged

    def _advantages(self, judged: Rewarded) -> tuple[torch.Tensor, torch.Tensor]:
        """The advantages (n, k), and whether each group has a signal, (n,)."""
        # the mean of equal rewards may differ from them by rounding
        advantages = self.law.advantages(judged.rewards).where(~judged.alike[:, None], 0.0)
        if not bool((advantages.abs() <= LARGEST).all()):
            raise RewardFailed(
                f"rewards: found an advantage of {float(advantages.abs().max()):.3g} in"
                f" {judged.judged[0].where} to {judged.judged[-1].where}, expected at most"
                f" {LARGEST:g}: give the reward a weight, for example 1e-6*FILE.py:FUNCTION"
            )
        counts = torch.tensor([[self._counts(one) for one in group] for group in judged.groups])
        return advantages, (counts & (advantages != 0)).any(1)

    def _counts(self, one: Completion) -> bool:
        return one.ended or self.sampling.truncated == "counted"

    def _silent(self, judged: Rewarded, loss: RolloutLoss) -> str:
        if not any(self._counts(one) for group in judged.groups for one in group):
            most = self.sampling.max_new_tokens
            return (
                f"truncated=masked: all completions were cut off at max_new_tokens={most}; try a"
                " larger max_new_tokens, or truncated=counted"
            )
        if not (read := judged.samples(2, 1)):
            return "no completion has a reward, because all rewards returned None"
        least = loss.counts[SILENT] = min(loss.counts.get(SILENT, math.inf), read[-1].reward)
        if least == loss.counts[HIGHEST] > loss.counts[LOWEST]:
            return f"all completions have the highest reward so far, {least:g}: {SOLVED}"
        samples = "; ".join(f"{o.where}: {o.completion[:80]!r} has {o.reward:g}" for o in read)
        entropy = judged.figures["entropy"]
        return (
            f"all completions of a prompt have the same reward, at an entropy of {entropy:.2g} nats"
            f" per token: {TRY[entropy < COLLAPSED]} ({samples})"
        )
