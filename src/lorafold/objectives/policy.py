"""Policy objectives: the model generates completions and learns from their rewards.

Samples depend only on the prompts, the weights, the run's seed and the step, so resuming is exact.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.console import Console

from lorafold.core.contexts import without_dropout
from lorafold.data.arrow import lengths_of
from lorafold.data.batches import BatchFeed, StoredFeed
from lorafold.data.examples import NO_LOSS, WHOLE, Example
from lorafold.data.formats import PROMPTS
from lorafold.data.json_input import Row
from lorafold.data.prompts import PromptEncoder, TokenizedPrompt, prompt_data
from lorafold.data.render import Rendering
from lorafold.data.row_store import Rows
from lorafold.data.rows import to_rows
from lorafold.data.tokenizing import Encoded, Encoder
from lorafold.engine import Sampling
from lorafold.errors import LorafoldError, RewardFailed
from lorafold.evaluation import Measured, RewardEvaluation, RewardSettings, evaluate_rewards
from lorafold.evaluation.episodes import Episode
from lorafold.evaluation.policy_rewards import RewardedRollouts
from lorafold.evaluation.reward_adapter import RewardAdapter, rewards_over
from lorafold.evaluation.rollouts import HELD_OUT, SLOTS, Rollouts, RolloutSize
from lorafold.files.model_card import JUDGED_BY
from lorafold.files.templates import interval_text
from lorafold.files.terminal import print_lines
from lorafold.objectives import Declared
from lorafold.objectives.algorithm_options import SamplingOptions, algorithm_class, policy_options
from lorafold.objectives.objective import ObjectiveRequest, OnPolicy, Packing
from lorafold.ops.arithmetic import override_widening, widens
from lorafold.ops.dropout import key_of
from lorafold.rewards import Calls, RewardName, Rewards
from lorafold.rewards.environments import NOUN
from lorafold.rewards.reward import REWARDS, DirectReward, environment_of, qualname
from lorafold.runtime.processes import SINGLE_PROCESS, Processes
from lorafold.training_step import policy_algorithms
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.policy_algorithms import PolicyAlgorithm
from lorafold.training_step.policy_loss import Policy, Rollout, StepRollouts
from lorafold.training_step.shared_prefixes import PrefixSupport, sharing_prefixes

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HIGHEST, LOWEST = "highest reward", "lowest reward"  # of all completions so far
LOWEST_SINCE_SIGNAL = "lowest reward since a signal"  # since the last step with a signal
MAX_ADVANTAGE = 1e12  # squared gradients must not overflow fp32
ENTROPY_WEIGHT, ENTROPY_STEP = "entropy weight", 0.005
COLLAPSED_ENTROPY = 0.1  # nats per token; at less, nearly all completions of a prompt are equal
SOLVED_HINT = "the rows are solved, unless the reward can be higher; try harder rows"
NO_SIGNAL_HINTS = (
    "the prompts are too hard or too easy for the model; try easier rows, a reward with partial"
    " credit, or more completions per prompt (group, dynamic_sampling)",
    "the policy has collapsed; try a lower learning rate, a higher beta, or more prompts per step"
    " (batch) and completions per prompt (group)",
)  # indexed by whether the policy has collapsed


class RolloutLoss(Policy):
    """The policy gradient loss, with the sampling engine and the rewards."""

    def __init__(
        self, model: PreTrainedModel, algorithm: PolicyAlgorithm, support: PrefixSupport | None,
        pad_id: int, rollouts: Rollouts, rewards: Rewards,
    ) -> None:
        temperature = rollouts.sampling.temperature
        super().__init__(
            model, algorithm, support, pad_id, rollouts.max_new_tokens, rollouts.exact, temperature
        )
        self.rollouts, self.rewards = (rollouts,), rewards  # a tuple hides submodules
        self.processes: Processes = SINGLE_PROCESS  # set by `refer`


@dataclass(frozen=True)
class PolicyObjective(OnPolicy):
    algorithm: PolicyAlgorithm
    sampling: SamplingOptions
    functions: tuple[Callable[..., Any], ...] = ()  # rewards in Python
    seed: int = 0
    adapters: Mapping[str, RewardAdapter] = field(default_factory=dict)  # by reward name
    environment: Any = ""  # a name or a Python object

    @classmethod
    def of(cls, request: ObjectiveRequest) -> Self:
        algorithm, sampling = policy_options(request.name, request.beta, request.options)
        if sampling.environment and request.environment:
            raise LorafoldError("environment: found two, expected one")
        environment = sampling.environment or request.environment
        if not 0 <= sampling.overlong <= (0 if environment else sampling.max_new_tokens):
            raise LorafoldError(
                f"overlong: found {sampling.overlong}, expected at most max_new_tokens, or 0 in an"
                " environment"
            )
        if sampling.turns != SamplingOptions.turns and not environment:
            raise LorafoldError("turns: found no environment, expected one (--environment)")
        tools = isinstance(environment, list | tuple) or str(environment).startswith("tools:")
        if not (sampling.rewards or request.rewards) and (tools or not environment):
            raise LorafoldError(
                f"objective {request.name}: found no reward, expected at least one: --reward"
                " FILE.py:FUNCTION, or rewards= in Python"
            )
        with environment_of(environment, Calls()):
            pass  # a wrong one is an error before the model loads
        parsed = {text: RewardName.parse(text) for text in sampling.rewards}
        adapters = {
            text: RewardAdapter.of(name, request.base)
            for text, name in parsed.items()
            if name.is_adapter
        }
        functions = tuple(request.rewards)
        return cls(algorithm, sampling, functions, request.seed, adapters, environment)

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        kinds = (algorithm_class(declared, policy_algorithms), SamplingOptions)
        return {field.name: field.default for kind in kinds for field in fields(kind)}

    @property
    def reads(self) -> Sequence[tuple[str, Path]]:  # type: ignore[override]
        adapters = [(name, saved) for name, one in self.adapters.items() for saved in one.stack]
        return [(f"for --reward {name}", saved.path) for name, saved in adapters]

    @property
    def identity(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The digests of the rewards, by name; empty for Python functions."""
        # not repr, which may contain an address that differs between processes
        names = [
            f"{fn.weight:g}*{fn.qualname}" if isinstance(fn, DirectReward) else qualname(fn)
            for fn in self.functions
        ]
        files = {text: RewardName.parse(text).digest for text in self.sampling.rewards}
        files |= {name: one.identity for name, one in self.adapters.items()}
        if isinstance(self.environment, str) and self.environment:
            files[self.environment] = RewardName.parse(self.environment).digest
        elif self.environment:
            own = self.environment
            names += map(qualname, own if isinstance(own, list | tuple) else [own])
        return {REWARDS: files | dict.fromkeys(names, "")}

    def record(self) -> dict[str, Any]:
        named = {one.name: one.weight for one in map(RewardName.parse, self.sampling.rewards)}
        if self.environment:
            named[NOUN] = 1.0
        return {JUDGED_BY: named | (Rewards.of(*self.functions).weights if self.functions else {})}

    def guessing(self, labels: Mapping[str, int]) -> float:
        return math.inf  # a policy loss is not comparable

    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return PromptEncoder(tokenizer)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Encoded:
        drops = self.sampling.long_prompts == "dropped"
        return prompt_data(table, rows, max_length - self.sampling.max_new_tokens, drops)

    def updates(self, examples: Any, loss: RolloutLoss) -> Iterator[Sequence[Rollout]]:
        figures, parts = examples.figures, self.sampling.mini_batches
        loss.entropy, loss.entropy_weight = figures["entropy"], figures.get(ENTROPY_WEIGHT, 0.0)
        for update, part in product(range(self.sampling.updates), range(parts)):
            loss.begin(update, part)
            yield examples[part::parts]

    def draws(self, feed: BatchFeed, held_out: Any) -> RolloutSize:
        assert isinstance(feed, StoredFeed)
        if (parts := self.sampling.mini_batches) > feed.batch:
            raise LorafoldError(f"mini_batches: found {parts}, expected at most batch={feed.batch}")
        lengths = [*lengths_of(feed.examples), *(lengths_of(held_out.examples) if held_out else [])]
        slots = min(SLOTS, feed.batch * self.sampling.group)
        first = feed.examples[0]
        longest = len(first.ids) + first.room if self.environment else max(lengths)
        return RolloutSize(slots, self.sampling.group, longest, self.sampling.max_new_tokens)

    def trained(self, example: TokenizedPrompt) -> Rollout:
        """A group of completions of the prompt that all have the maximum length, for the memory
        estimate.
        """
        n, k = self.sampling.max_new_tokens, self.sampling.group
        ids = (0,) * (n + example.room if self.environment else n)
        document = Example((*example.ids, *ids), ((NO_LOSS,) * len(example.ids)) + ids)
        prompt = len(example.ids)
        return Rollout.of([document] * k, prompt, [()] * k, [0.0] * k, [True] * k)

    def preview(self, example: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> Text:
        from rich.text import Text

        text = str(tokenizer.decode(list(example.ids), skip_special_tokens=False))
        if self.environment:
            text += "\n(the environment may add tools and replace these messages)"
        return Text(text, style="dim")

    @contextmanager
    def loss(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packing: Packing,
        console: Console,
    ) -> Iterator[RolloutLoss]:
        sampling = self.sampling
        with ExitStack() as stack:
            rewards = stack.enter_context(self._rewards(model, packing, console))
            rollouts = Rollouts(
                model, tokenizer, sampling.group, sampling.max_new_tokens,
                Sampling(temperature=sampling.temperature), sampling.exact,
                environment=stack.enter_context(environment_of(self.environment, self._calls)),
                turns=self._turns,
            )  # fmt: skip
            stack.callback(rollouts.close)
            if dropped := stack.enter_context(without_dropout(model)):
                dropout = f"dropout: {dropped:g} in the model or its adapters is set to 0"
                print_lines(console, f"{dropout}, because sampling uses no dropout")
            support = None
            if packing:
                support = stack.enter_context(sharing_prefixes(model, across=packing == "auto"))
            if sampling.exact and (support is None or not support.packs):
                raise LorafoldError(
                    "exact: found padded sequences, expected packed ones, as in sampling; turn"
                    " packing on, if the model supports it, or train without exact"
                )
            if sampling.exact:  # also in the backward pass, which recomputes checkpoints
                stack.enter_context(override_widening(widened=widens(model.dtype), rows=1))
            pad_id = tokenizer.pad_token_id or 0
            yield RolloutLoss(model, self.algorithm, support, pad_id, rollouts, rewards)

    def refer(
        self, loss: RolloutLoss, feed: BatchFeed, held_out: Any, below: Sequence[str],
        console: Console, layout: Replicated,
    ) -> tuple[BatchFeed, Any]:
        """Opens the sampling engine, with a KV cache for the longest prompt."""
        loss.processes = layout.processes
        size = self.draws(feed, held_out)
        if loss.rollouts[0].open(size.prompt, size.slots):
            reason = "exact: on this processor, matmuls depend on the number of rows, so some"
            print_lines(console, f"{reason} rounding differences remain")
        return feed, held_out

    def examples(
        self, step: int, planned: Sequence[TokenizedPrompt], loss: RolloutLoss
    ) -> StepRollouts:
        """Samples a group of completions for each planned prompt. As in TRL, groups with equal
        rewards count in the mean loss. Rank 0 computes all rewards, because they may differ
        between processes.
        """
        return loss.processes.once(partial(self._rollouts, step, planned, loss))

    def _rollouts(
        self, step: int, planned: Sequence[TokenizedPrompt], loss: RolloutLoss
    ) -> StepRollouts:
        key, seconds, num_resampled = key_of(self.seed, step), defaultdict[str, float](float), 0
        sample = partial(self._sample, step, loss, seconds)
        scored = first = sample(planned, key)
        tokens = first.tokens
        advantages, has_signal = self._advantages(scored)
        for attempt in range(1, self.sampling.dynamic_sampling + 1):
            if not (empty := (~has_signal).nonzero().flatten().tolist()):
                break
            more = sample([planned[i] for i in empty], key_of(key, attempt))
            scored, num_resampled = scored.replaced(empty, more), num_resampled + len(empty)
            tokens += more.tokens
            advantages, has_signal = self._advantages(scored)
        figures = dict(first.figures)
        if self.sampling.dynamic_sampling:
            figures["groups drawn again"] = num_resampled / len(planned)
        if floor := self.sampling.entropy_floor:
            is_low, weight = figures["entropy"] < floor, loss.counts.get(ENTROPY_WEIGHT, 0.0)
            weight = max(0.0, weight + (ENTROPY_STEP if is_low else -ENTROPY_STEP))
            loss.counts[ENTROPY_WEIGHT], figures[ENTROPY_WEIGHT] = weight, weight * is_low
        reason = "" if bool(has_signal.any()) else self._no_signal_reason(scored, loss)
        rollouts = [
            Rollout.of(
                [Example(tuple(one.ids), tuple(one.labels)) for one in group],
                min(one.start for one in group), [one.logprobs for one in group], row,
                [self._counts(one) for one in group],
            )
            for group, row in zip(scored.groups, advantages.tolist(), strict=True)
        ]  # fmt: skip
        if not reason:
            loss.counts.pop(LOWEST_SINCE_SIGNAL, None)
        elif not step:
            rollouts = []  # the policy still equals its reference, so the KL has no gradient
        return StepRollouts(rollouts, reason, figures, tokens, dict(seconds), first.samples_json)

    def measure(self, loss: RolloutLoss, held_out: Encoded) -> Measured:
        """The mean reward of one completion per prompt, with its confidence interval. All
        evaluations use the same random numbers. The loss is the negative mean reward.
        """
        rollouts, prompts = loss.rollouts[0], held_out.examples
        groups = rollouts.sample(prompts, key_of(self.seed, HELD_OUT), 1)
        scored = RewardedRollouts.of(prompts, groups, loss.rewards, at_once=SLOTS)
        reward, interval = scored.figures["reward"], scored.interval
        # a group of one completion never has a signal
        figures = {k: v for k, v in scored.figures.items() if k != "groups without signal"}
        text = f", reward {reward:.3f}{interval_text(interval, '.3f')}"
        return Measured(-reward, figures | {"reward_interval": interval}, text, scored.samples_json)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row],
        max_length: int,
    ) -> RewardEvaluation:  # fmt: skip
        """The rewards of completions sampled with the run's seed, as many per prompt as in
        training.
        """
        max_new_tokens, k = self.sampling.max_new_tokens, self.sampling.group
        config = RewardSettings(
            max_length, max_new_tokens, k, self.sampling.temperature, self.seed, self._turns
        )
        with (
            self._rewards(model, "auto", Console(quiet=True)) as rewards,
            environment_of(self.environment, self._calls) as environment,
        ):
            prompts = to_rows(rows, PROMPTS)
            result = evaluate_rewards(model, tokenizer, prompts, rewards, config, None, environment)
        if None in result.prompt_rewards:
            row = result.prompt_rewards.index(None) + 1
            raise LorafoldError(f"held-out row {row}: all rewards returned None, expected a number")
        return result

    def _rewards(self, model: PreTrainedModel, packing: Packing, console: Console) -> Any:
        given: list[Any] = [*self.sampling.rewards, *self.functions]
        return rewards_over(model, given, self.adapters, self._calls, packing, console)

    @property
    def _turns(self) -> int:
        return self.sampling.turns if self.environment else 1

    @property
    def _calls(self) -> Calls:
        own = self.sampling
        return Calls(own.reward_seconds, own.reward_concurrency, own.reward_retries)

    def _sample(
        self, step: int, loss: RolloutLoss, seconds: dict[str, float],
        prompts: Sequence[TokenizedPrompt], key: int,
    ) -> RewardedRollouts:  # fmt: skip
        start = time.perf_counter()
        groups = loss.rollouts[0].sample(prompts, key)
        sampled = time.perf_counter()
        scored = RewardedRollouts.of(prompts, groups, loss.rewards, step=step)
        if window := self.sampling.overlong:
            lengths = torch.tensor([[len(one.logprobs) for one in group] for group in groups])
            penalty = ((self.sampling.max_new_tokens - window - lengths) / window).clamp(-1, 0)
            each = {**scored.each, "overlong": penalty}
            scored = replace(scored, rewards=scored.rewards + penalty, each=each)
        seconds["drawing"] += sampled - start
        seconds["judging"] += time.perf_counter() - sampled
        if rewards := scored.rewards[~scored.rewards.isnan()].tolist():
            loss.counts[HIGHEST] = max(loss.counts.get(HIGHEST, rewards[0]), *rewards)
            loss.counts[LOWEST] = min(loss.counts.get(LOWEST, rewards[0]), *rewards)
        return scored

    def _advantages(self, scored: RewardedRollouts) -> tuple[torch.Tensor, torch.Tensor]:
        """The advantages (n, k), and whether each group has a learning signal, (n,)."""
        # the mean of equal rewards may differ from them by rounding
        advantages = self.algorithm.advantages(scored.rewards).where(~scored.alike[:, None], 0.0)
        if not bool((advantages.abs() <= MAX_ADVANTAGE).all()):
            raise RewardFailed(
                f"rewards: found an advantage of {float(advantages.abs().max()):.3g} in"
                f" {scored.judged[0].where} to {scored.judged[-1].where}, expected at most"
                f" {MAX_ADVANTAGE:g}: give the reward a weight, for example 1e-6*FILE.py:FUNCTION"
            )
        counts = torch.tensor([[self._counts(one) for one in group] for group in scored.groups])
        return advantages, (counts & (advantages != 0)).any(1)

    def _counts(self, one: Episode) -> bool:
        return not one.refused and (one.ended or self.sampling.truncated == "counted")

    def _no_signal_reason(self, scored: RewardedRollouts, loss: RolloutLoss) -> str:
        if not any(self._counts(one) for group in scored.groups for one in group):
            limit = self.sampling.max_new_tokens
            return (
                f"truncated=masked: all completions were cut off at max_new_tokens={limit}; try a"
                " larger max_new_tokens, or truncated=counted"
            )
        if not (samples := scored.samples(2, 1)):
            return "no completion has a reward, because all rewards returned None"
        lowest = min(loss.counts.get(LOWEST_SINCE_SIGNAL, math.inf), samples[-1].reward)
        loss.counts[LOWEST_SINCE_SIGNAL] = lowest
        if lowest == loss.counts[HIGHEST] > loss.counts[LOWEST]:
            return f"all completions have the highest reward so far, {lowest:g}: {SOLVED_HINT}"
        shown = "; ".join(f"{o.where}: {o.completion[:80]!r} has {o.reward:g}" for o in samples)
        entropy = scored.figures["entropy"]
        return (
            f"for each prompt, all completions have the same reward, at an entropy of {entropy:.2g}"
            f" nats per token: {NO_SIGNAL_HINTS[entropy < COLLAPSED_ENTROPY]} ({shown})"
        )
