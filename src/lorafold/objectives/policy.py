"""Objectives of policies: completions that the model draws itself, rewards, and a law over them.

A step draws a group of completions of each of its prompts, has them judged, and learns from the
groups whose rewards differ. What it draws follows from the weights, the run's seed and the step, so
a run that is resumed goes on exactly.
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
from lorafold.data.prompts import PromptEncoder, TokenizedPrompt, prompt_data
from lorafold.data.render import Rendering
from lorafold.data.row_store import Rows
from lorafold.data.rows import as_checked
from lorafold.data.shapes import PROMPTS
from lorafold.data.sources import Row
from lorafold.data.tokenizing import Encoded, Encoder
from lorafold.errors import LorafoldError, RewardFailed
from lorafold.evaluation import Measured, RewardEvaluation, RewardSettings, evaluate_rewards
from lorafold.evaluation.policy import Rewarded
from lorafold.evaluation.reward_adapter import RewardAdapter, rewards_over
from lorafold.evaluation.rollouts import SLOTS, Completion, Rollouts, RolloutSize
from lorafold.files.model_card import JUDGED_BY, within
from lorafold.objectives import Declared
from lorafold.objectives.algorithms import SamplingOptions, chosen, class_of
from lorafold.objectives.objective import ObjectiveRequest, OnPolicy, Packing
from lorafold.ops.arithmetic import multiplying, widens
from lorafold.ops.dropout import key_of
from lorafold.rewards import Rewards, digest_of
from lorafold.rewards.judging import REWARDS, adapter_in, kind_of, parted
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
SILENT = "lowest reward since a signal"  # of those since the last step with one
LARGEST = 1e12  # an advantage: squares of gradients times it are still numbers of fp32
COLLAPSED = 0.1  # nats a token: below it nearly all completions of a prompt are the same
SOLVED = "the rows are solved, unless the reward can be higher; try harder rows"
TRY = (
    "the prompts are too hard or too easy for it; try easier rows, a reward that grades, or more"
    " completions of a prompt (group, fill)",
    "the policy has collapsed; try a lower learning rate, beta, or more prompts a step (batch) and"
    " completions of a prompt (group)",
)  # by whether it has collapsed


class Playing(Policy):
    """The loss of a policy with what draws and judges its completions."""

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
        self.rollouts, self.rewards = (rollouts,), rewards  # in a tuple: it has a model of its own
        self.processes: Processes = ALONE  # as `refer` has them


@dataclass(frozen=True)
class PolicyObjective(OnPolicy):
    """Learning from rewards, by a law."""

    law: PolicyLaw
    drawing: SamplingOptions
    given: tuple[Callable[..., Any], ...] = ()  # rewards that are functions of Python
    seed: int = 0
    adapters: Mapping[str, RewardAdapter] = field(default_factory=dict)  # by what names them

    @classmethod
    def of(cls, asked: ObjectiveRequest) -> Self:
        law, drawing = chosen(asked.name, asked.beta, asked.options)
        if not (drawing.rewards or asked.rewards):
            raise LorafoldError(
                f"objective {asked.name}: found no reward, expected one or several: --reward"
                " FILE.py:FUNCTION, or rewards= in Python"
            )
        named = [text for text in drawing.rewards if adapter_in(text)]
        for text in drawing.rewards:
            _ = adapter_in(text) or kind_of(text)  # a form that is wrong is told first
        adapters = {text: RewardAdapter.of(text, asked.base) for text in named}
        return cls(law, drawing, tuple(asked.rewards), asked.seed, adapters)

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        kinds = (class_of(declared, policy_algorithms), SamplingOptions)
        return {field.name: field.default for kind in kinds for field in fields(kind)}

    @property
    def reads(self) -> Sequence[tuple[str, Path]]:  # type: ignore[override]
        """The adapters that judge."""
        found = [(name, saved) for name, one in self.adapters.items() for saved in one.stack]
        return [(f"for --reward {name}", saved.path) for name, saved in found]

    @property
    def identity(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The digests of what judges, by name."""
        # an object's own repr may have its address, which another process does not have
        names = [getattr(fn, "__qualname__", type(fn).__qualname__) for fn in self.given]
        files = {name: digest_of(name) for name in self.drawing.rewards}
        files |= {name: one.identity for name, one in self.adapters.items()}
        return {REWARDS: files | dict.fromkeys(names, "")}

    def record(self) -> dict[str, Any]:
        named = {name: weight for weight, name in map(parted, self.drawing.rewards)}
        return {JUDGED_BY: named | (Rewards.of(*self.given).weights if self.given else {})}

    def guessing(self, labels: Mapping[str, int]) -> float:
        return math.inf  # a loss of advantages says nothing

    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return PromptEncoder(tokenizer)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Encoded:
        return prompt_data(table, rows, max_length - self.drawing.max_new_tokens)

    def updates(self, examples: Sequence[Rollout], loss: Playing) -> Iterator[Sequence[Rollout]]:
        for update in range(self.drawing.updates):
            loss.begin(update)
            yield examples

    def draws(self, feed: BatchFeed, held_out: Any) -> RolloutSize:
        assert isinstance(feed, StoredFeed)
        lengths = [*lengths_of(feed.examples), *(lengths_of(held_out.examples) if held_out else [])]
        slots = min(SLOTS, feed.batch * self.drawing.group)
        return RolloutSize(slots, self.drawing.group, max(lengths), self.drawing.max_new_tokens)

    def trained(self, example: TokenizedPrompt) -> Rollout:
        """A group of completions of that prompt, as long as they may be."""
        own, k = (0,) * self.drawing.max_new_tokens, self.drawing.group
        return Rollout.of(example.ids, [own] * k, [()] * k, [0.0] * k, [True] * k)

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
    ) -> Iterator[Playing]:
        drawing = self.drawing
        with ExitStack() as stack:
            rewards = stack.enter_context(self._judging(model, packing, console))
            rollouts = Rollouts(
                model, tokenizer, drawing.group, drawing.max_new_tokens, exact=drawing.exact
            )
            stack.callback(rollouts.close)
            if dropped := stack.enter_context(undropped(model)):
                told = f"dropout: found {dropped:g} in the model or its adapters, taken as 0"
                console.print(f"{told}: completions are drawn without", highlight=False)
            how = None
            if packing:
                how = stack.enter_context(branching(model, across=packing == "auto"))
            if drawing.exact and (how is None or not how.packs):
                raise LorafoldError(
                    "exact: found padded sequences, expected packed ones, as drawing computes them;"
                    " turn packing on, or train without exact"
                )
            if drawing.exact:  # in the backward too, where checkpointed parts run again
                stack.enter_context(multiplying(widened=widens(model.dtype), rows=1))
            yield Playing(model, self.law, how, tokenizer.pad_token_id or 0, rollouts, rewards)

    def refer(
        self, loss: Playing, feed: BatchFeed, held_out: Any, below: Sequence[str], console: Console,
        layout: Replicated,
    ) -> tuple[BatchFeed, Any]:
        """Open what draws, for the longest prompt of both."""
        loss.processes = layout.processes
        drawn = self.draws(feed, held_out)
        if loss.rollouts[0].open(drawn.prompt, drawn.slots):
            told = "exact: products depend on the number of rows on this processor, so that some"
            console.print(f"{told} differences of rounding remain", highlight=False)
        return feed, held_out

    def examples(
        self, step: int, planned: Sequence[TokenizedPrompt], loss: Playing
    ) -> StepRollouts:
        """The groups that the model draws of the planned prompts. Those whose rewards are alike
        count in the mean too, as in TRL. Process 0 judges for all: another may judge otherwise.
        """
        return loss.processes.once(partial(self._rollouts, step, planned, loss))

    def _rollouts(
        self, step: int, planned: Sequence[TokenizedPrompt], loss: Playing
    ) -> StepRollouts:
        key, seconds, again = key_of(self.seed, step), defaultdict[str, float](float), 0
        found = first = self._drawn(planned, key, loss, seconds)
        tokens = first.tokens
        advantages, learns = self._advantages(found)
        for attempt in range(1, self.drawing.fill + 1):
            if not (empty := (~learns).nonzero().flatten().tolist()):
                break
            prompts = [planned[i] for i in empty]
            more = self._drawn(prompts, key_of(key, attempt), loss, seconds)
            found, again = found.replaced(empty, more), again + len(empty)
            tokens += more.tokens
            advantages, learns = self._advantages(found)
        figures = dict(first.figures)
        if self.drawing.fill:
            figures["groups drawn again"] = again / len(planned)
        silent = "" if bool(learns.any()) else self._silent(found, loss)
        rollouts = [
            Rollout.of(
                prompt.ids,
                [one.tokens for one in group],
                [one.logprobs for one in group],
                own,
                [self._counts(one) for one in group],
            )
            for prompt, group, own in zip(planned, found.groups, advantages.tolist(), strict=True)
        ]
        if not silent:
            loss.counts.pop(SILENT, None)
        elif not step:
            rollouts = []  # a policy that is its reference has nothing to be held back from
        return StepRollouts(rollouts, silent, figures, tokens, dict(seconds), first.to_read)

    def measure(self, loss: Playing, held_out: Encoded) -> Measured:
        """The mean reward of one completion of each prompt, always of the same draws, with its
        interval; the loss is minus that.
        """
        rollouts, prompts = loss.rollouts[0], held_out.examples
        groups = rollouts.draw_held_out([prompt.ids for prompt in prompts], self.seed)
        found = Rewarded.of(prompts, groups, loss.rewards, at_once=SLOTS)
        reward, interval = found.figures["reward"], found.interval
        # of a group of one all rewards are alike
        own = {k: v for k, v in found.figures.items() if k != "groups without signal"}
        figures = own | {"reward_interval": interval}
        told = f", reward {reward:.3f}{within(interval, '.3f')}"
        return Measured(-reward, figures, told, found.to_read)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row],
        max_length: int,
    ) -> RewardEvaluation:  # fmt: skip
        """What completions of prompts are worth, as many of each as in training, under the run's
        seed.
        """
        longest, k = self.drawing.max_new_tokens, self.drawing.group
        how = RewardSettings(max_length, longest, k, seed=self.seed)
        with self._judging(model, "auto", Console(quiet=True)) as rewards:
            found = evaluate_rewards(model, tokenizer, as_checked(rows, PROMPTS), rewards, how)
        if None in found.prompt_rewards:
            row = found.prompt_rewards.index(None) + 1
            raise LorafoldError(f"held-out row {row}: found no reward that applies, expected one")
        return found

    def _judging(self, model: PreTrainedModel, packing: Packing, console: Console) -> Any:
        given: list[Any] = [*self.drawing.rewards, *self.given]
        limit = self.drawing.reward_seconds
        return rewards_over(model, given, self.adapters, limit, packing, console)

    def _drawn(
        self, prompts: Sequence[TokenizedPrompt], key: int, loss: Playing, seconds: dict[str, float]
    ) -> Rewarded:
        """Groups of completions with their rewards; adds the seconds that both took."""
        start = time.perf_counter()
        groups = loss.rollouts[0].draw([prompt.ids for prompt in prompts], key)
        drawn = time.perf_counter()
        found = Rewarded.of(prompts, groups, loss.rewards)
        seconds["drawing"] += drawn - start
        seconds["judging"] += time.perf_counter() - drawn
        if given := found.rewards[~found.rewards.isnan()].tolist():
            loss.counts[HIGHEST] = max(loss.counts.get(HIGHEST, given[0]), *given)
            loss.counts[LOWEST] = min(loss.counts.get(LOWEST, given[0]), *given)
        return found

    def _advantages(self, found: Rewarded) -> tuple[torch.Tensor, torch.Tensor]:
        """The advantages (n, k), and whether there is anything to learn from each group, (n,)."""
        # a mean of equal numbers may differ from them by its rounding
        advantages = self.law.advantages(found.rewards).where(~found.alike[:, None], 0.0)
        if not bool((advantages.abs() <= LARGEST).all()):
            raise RewardFailed(
                f"rewards: found an advantage of {float(advantages.abs().max()):.3g} in"
                f" {found.judged[0].where} to {found.judged[-1].where}, expected at most"
                f" {LARGEST:g}: give the reward a weight, as in 1e-6*FILE.py:FUNCTION"
            )
        counts = torch.tensor([[self._counts(one) for one in group] for group in found.groups])
        return advantages, (counts & (advantages != 0)).any(1)

    def _counts(self, one: Completion) -> bool:
        return one.ended or self.drawing.truncated == "counted"

    def _silent(self, found: Rewarded, loss: Playing) -> str:
        """Why a step has nothing to learn, and what to try."""
        if not any(self._counts(one) for group in found.groups for one in group):
            most = self.drawing.max_new_tokens
            return (
                f"truncated=masked: all completions were cut off at max_new_tokens={most}; try more"
                " max_new_tokens, or truncated=counted"
            )
        if not (read := found.samples(2, 1)):
            return "no completion has a reward, as all rewards returned None"
        least = loss.counts[SILENT] = min(loss.counts.get(SILENT, math.inf), read[-1].reward)
        if least == loss.counts[HIGHEST] > loss.counts[LOWEST]:
            return f"all completions have the highest reward so far, {least:g}: {SOLVED}"
        samples = "; ".join(f"{o.where}: {o.completion[:80]!r} has {o.reward:g}" for o in read)
        entropy = found.figures["entropy"]
        return (
            f"all completions of a prompt have the same reward, at an entropy of {entropy:.2g} nats"
            f" a token: {TRY[entropy < COLLAPSED]} ({samples})"
        )
