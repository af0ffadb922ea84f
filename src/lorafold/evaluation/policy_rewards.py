"""Evaluation of a policy: rewards of the completions that it generates for held-out prompts.

    reward = 1/n sum_i r_i          r_i is the mean reward of the completions of prompt i

Completions of a prompt are not independent, so 95% intervals are computed over prompts. With one
completion per prompt and the seed of a training run, the completions equal the completions of the
run's evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lorafold.data.arrow import lengths_of
from lorafold.data.prompts import PromptEncoder, TokenizedPrompt, prompt_data
from lorafold.data.row_store import Rows
from lorafold.data.tokenizing import tokenize_rows
from lorafold.engine import Sampling
from lorafold.errors import LorafoldError, RewardFailed, truncate
from lorafold.evaluation.episodes import Episode
from lorafold.evaluation.intervals import Interval, mean_interval
from lorafold.evaluation.rollouts import HELD_OUT, SLOTS, Rollouts
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.templates import interval_text, render_text
from lorafold.files.terminal import Progress, no_progress, print_lines, progress_bar
from lorafold.generation import positions_left
from lorafold.ops.dropout import key_of
from lorafold.rewards import Judged, Rewards
from lorafold.rewards.environments import Environment, single_turn

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SAMPLES = 3  # samples with the highest, and with the lowest rewards
MAX_PRINTED_CHARS = 200  # characters of a printed completion
MAX_STORED_CHARS = 2000  # characters of a shortened prompt or completion


@dataclass(frozen=True)
class PolicySample:
    """A sampled completion and its reward.

    Attributes:
        where: The prompt's row, and the number of the completion.
        prompt: The prompt as text or messages.
        ended: Whether the completion ended before max_new_tokens.
        each: With several rewards, the value of each reward that applies.
    """

    where: str
    prompt: Any
    completion: str
    reward: float
    ended: bool
    each: Mapping[str, float] = field(default_factory=dict)

    def shortened(self) -> dict[str, Any]:
        """The fields as JSON, with prompt and completion as text of bounded length."""
        prompt = self.prompt
        if not isinstance(prompt, str):
            lines = []
            for turn in prompt:
                content = turn.get("content")
                if not isinstance(content, str):
                    content = json.dumps(content, ensure_ascii=False)
                lines.append(f"{turn.get('role')}: {content}")
            prompt = "\n".join(lines)
        texts = {"prompt": prompt, "completion": self.completion}
        cut = {name: truncate(text, MAX_STORED_CHARS) for name, text in texts.items()}
        return asdict(self) | cut


@dataclass(frozen=True)
class RewardedRollouts:
    """Groups of k completions for n prompts, and their rewards (n, k); NaN if no reward applies."""

    judged: Sequence[Judged]  # n * k
    groups: Sequence[Sequence[Episode]]
    rewards: Tensor
    each: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, prompts: Sequence[TokenizedPrompt], groups: Sequence[Sequence[Episode]],
        rewards: Rewards, at_once: int | None = None, progress: Progress = no_progress,
        step: int | None = None,
    ) -> Self:  # fmt: skip
        """Computes the rewards in one call or, because calls have a time limit, for `at_once`
        prompts per call. With `at_once`, at least one completion must have a reward. `step` is the
        step of training, if any.
        """
        judged = [
            Judged(
                prompt.question, one.text, prompt.other_fields, f"{prompt.where}, completion {n}",
                prompt.conversation,
                {
                    "tokens": len(one.logprobs), "ended": "stop" if one.ended else "length",
                    "step": step, "messages": [*one.messages],
                },
                one.rewards, one.refused,
            )
            for prompt, group in zip(prompts, groups, strict=True)
            for n, one in enumerate(group, 1)
        ]  # fmt: skip
        sums, by_reward = list[float | None](), dict[str, list[float | None]]()
        size = (at_once or len(prompts)) * len(groups[0])
        for start in range(0, len(judged), size):
            total, by_name = rewards(judged[start : start + size])
            sums += total
            by_reward = {
                name: [
                    *by_reward.get(name, [None] * start), *by_name.get(name, [None] * len(total))
                ]
                for name in by_reward | by_name
            }  # fmt: skip
            progress(len(sums), len(judged))
        if at_once and sums.count(None) == len(sums):
            raise RewardFailed(
                f"rewards: all returned None for {judged[0].where} to {judged[-1].where}, expected"
                " a number for at least one completion"
            )
        tables = {name: _reward_matrix(x, len(groups)) for name, x in by_reward.items()}
        return cls(judged, groups, _reward_matrix(sums, len(groups)), tables)

    def replaced(self, places: Sequence[int], other: RewardedRollouts) -> RewardedRollouts:
        k, groups, judged = self.rewards.shape[1], [*self.groups], [*self.judged]
        for i, place in enumerate(places):
            groups[place] = other.groups[i]
            judged[place * k : (place + 1) * k] = other.judged[i * k : (i + 1) * k]
        rows = torch.tensor(places)
        rewards = self.rewards.index_copy(0, rows, other.rewards)
        none = [torch.full_like(one.rewards, math.nan) for one in (self, other)]
        each = {
            name: self.each.get(name, none[0]).index_copy(0, rows, other.each.get(name, none[1]))
            for name in {**self.each, **other.each}
        }
        return RewardedRollouts(judged, groups, rewards, each)

    @property
    def completions(self) -> list[Episode]:
        return [one for group in self.groups for one in group]

    @property
    def tokens(self) -> int:
        return sum(len(one.logprobs) for one in self.completions)

    @property
    def interval(self) -> Interval | None:
        return _interval(self.rewards)

    @property
    def alike(self) -> Tensor:
        """Whether all rewards of a group are equal, (n,)."""
        high, low = self.rewards.nan_to_num(-math.inf), self.rewards.nan_to_num(math.inf)
        return high.max(1).values <= low.min(1).values

    @cached_property
    def figures(self) -> dict[str, float]:
        """Means over all completions: the reward, each of several rewards over the completions that
        it applies to, the length and the entropy; also the share of groups with equal rewards.
        """
        completions, tokens = self.completions, self.tokens
        n, turns = len(completions), sum(one.turns for one in completions)
        refused = sum(bool(one.refused) for one in completions)
        means = {f"reward {name}": float(x.nanmean()) for name, x in self.each.items()}
        without = float(self.rewards.isnan().double().mean())
        return {
            "reward": float(self.rewards.nanmean()),
            **(means if len(means) > 1 else {}),
            **({"without a reward": without} if without else {}),
            "tokens a completion": tokens / n,
            "cut off": sum(not one.ended for one in completions) / n,
            **({"turns": turns / n} if turns > n else {}),
            **({"refused": refused / n} if refused else {}),
            "entropy": sum(-sum(one.logprobs) for one in completions) / max(1, tokens),
            "groups without signal": float(self.alike.double().mean()),
        }

    @property
    def samples_json(self) -> list[dict[str, Any]]:
        return [one.shortened() for one in self.samples(NUM_SAMPLES, NUM_SAMPLES)]

    def samples(self, best: int, worst: int) -> list[PolicySample]:
        rewards = self.rewards.flatten().tolist()
        several = self.each if len(self.each) > 1 else {}
        values = {name: x.flatten().tolist() for name, x in several.items()}
        order = [index for index, reward in enumerate(rewards) if not math.isnan(reward)]
        order.sort(key=lambda index: -rewards[index])
        completions, samples = self.completions, []
        for index in order[:best] + order[max(best, len(order) - worst) :]:
            one, ended = self.judged[index], completions[index].ended
            own = {name: x[index] for name, x in values.items() if not math.isnan(x[index])}
            samples.append(
                PolicySample(one.where, one.prompt, one.completion, rewards[index], ended, own)
            )
        return samples


def _reward_matrix(values: Sequence[float | None], rows: int) -> Tensor:
    numbers = [math.nan if value is None else value for value in values]
    return torch.tensor(numbers, dtype=torch.float64).view(rows, -1)


def _interval(rewards: Tensor) -> Interval | None:  # (n, k)
    means = rewards.nanmean(1)
    return mean_interval(means[~means.isnan()].tolist())


@dataclass(frozen=True)
class RewardSettings:
    """Sampling of `group` completions for each held-out prompt, with at most `max_length` tokens
    including the prompt, of at most `turns` turns. Temperature 1 samples as in training; 0 is
    greedy.
    """

    max_length: int
    max_new_tokens: int
    group: int = 1
    temperature: float = 1.0
    seed: int = 0
    turns: int = 1

    def __post_init__(self) -> None:
        for name in ("max_length", "max_new_tokens", "group", "seed", "turns"):
            if not isinstance(value := getattr(self, name), int):
                raise LorafoldError(f"{name}: found {value!r:.40}, expected an integer")
        checks = {
            f"group: found {self.group}, expected 1 or more": self.group >= 1,
            f"group: found {self.group} at temperature 0, expected 1, because all completions"
            " of a prompt would be the same": self.group <= 1 or self.temperature != 0,
            f"max_new_tokens: found {self.max_new_tokens}, expected at least 1 and less than"
            f" max_length, {self.max_length}": 1 <= self.max_new_tokens < self.max_length,
            f"seed: found {self.seed}, expected 0 to {2**32 - 1}": 0 <= self.seed < 2**32,
        }
        if wrong := [what for what, right in checks.items() if not right]:
            raise LorafoldError("; ".join(wrong))
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature)


@dataclass(frozen=True)
class MeanReward:
    """The mean of one reward, without its weight; the 95% interval is None for a single prompt."""

    mean: float
    interval: Interval | None

    def __str__(self) -> str:
        return f"{self.mean:.4g}{interval_text(self.interval)}"


@dataclass(frozen=True)
class RewardEvaluation(ShownInNotebooks):
    """Rewards of `group` completions for each of n prompts.

    Attributes:
        reward: The mean of the weighted sum of all rewards.
        rewards: The mean of each reward, by name.
        tokens_a_completion: The mean length of the completions, in tokens.
        cut_off: The share of completions that reached max_new_tokens.
        entropy: In nats per token, estimated from the sampled tokens' log-probabilities.
        best_of_group: The mean of each prompt's highest reward; pass@k if rewards are 0 or 1.
        groups_without_signal: The share of prompts whose completions all have the same reward; None
            with one completion per prompt.
        prompt_rewards: The mean reward of each prompt, in the order of the rows; None if no reward
            applies.
        samples: The best and the worst completions, from best to worst.
    """

    reward: float
    reward_interval: Interval | None
    rewards: Mapping[str, MeanReward]
    n: int
    group: int
    max_new_tokens: int
    tokens_a_completion: float
    cut_off: float
    entropy: float
    best_of_group: float
    groups_without_signal: float | None
    prompt_rewards: tuple[float | None, ...]
    samples: tuple[PolicySample, ...]

    def __str__(self) -> str:
        return render_text("evaluation/rewards.jinja", found=self, short=_short, read=NUM_SAMPLES)


def evaluate_rewards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, rewards: Rewards,
    settings: RewardSettings, console: Console | None = None,
    environment: Environment = single_turn,
) -> RewardEvaluation:  # fmt: skip
    """Generates completions with the model's active adapters, and computes their rewards. The model
    is not changed.
    """
    if not model.can_generate():
        raise LorafoldError(
            f"{type(model).__name__}: found a model that can't generate text, expected a"
            " causal language model for rewards"
        )
    length = min(positions_left(model) or settings.max_length, settings.max_length)
    table = tokenize_rows(rows, PromptEncoder(tokenizer), console)
    data = prompt_data(table, rows, length - settings.max_new_tokens)
    if console:
        print_lines(console, data.report)
    prompts, k = data.examples, settings.group
    new, turns = settings.max_new_tokens, settings.turns
    rollouts = Rollouts(model, tokenizer, k, new, settings.sampling, False, environment, turns)
    longest = length - new if turns > 1 else max(lengths_of(prompts))
    with closing(rollouts), progress_bar(console, "completions") as step:
        rollouts.open(longest, min(SLOTS, len(prompts) * k))
        groups = rollouts.sample(prompts, key_of(settings.seed, HELD_OUT), k, step)
    with progress_bar(console, "rewards") as step:
        judged = RewardedRollouts.of(prompts, groups, rewards, max(1, SLOTS // k), step)
    figures, means = judged.figures, judged.rewards.nanmean(1).tolist()
    has_reward = ~judged.rewards.isnan().all(1)
    return RewardEvaluation(
        reward=figures["reward"],
        reward_interval=judged.interval,
        rewards={
            name: MeanReward(float(x.nanmean()), _interval(x)) for name, x in judged.each.items()
        },
        n=len(judged.groups),
        group=k,
        max_new_tokens=settings.max_new_tokens,
        tokens_a_completion=figures["tokens a completion"],
        cut_off=figures["cut off"],
        entropy=figures["entropy"],
        best_of_group=float(judged.rewards.nan_to_num(-math.inf).max(1).values[has_reward].mean()),
        groups_without_signal=figures["groups without signal"] if k > 1 else None,
        prompt_rewards=tuple(None if math.isnan(mean) else mean for mean in means),
        samples=tuple(judged.samples(NUM_SAMPLES, NUM_SAMPLES)),
    )


def _short(text: str) -> str:
    more = len(text) - MAX_PRINTED_CHARS
    return repr(text[:MAX_PRINTED_CHARS]) + (f" and {more:,} more characters" if more > 0 else "")
