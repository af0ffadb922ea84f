"""How good a policy is: the rewards of the completions that it generates for held-out prompts.

    reward = 1/n sum_i r_i          r_i is the mean reward of the completions of prompt i

The completions of a prompt are not independent, so the units of the 95% intervals are prompts. With
one completion each and a run's seed, they are those that the run measures on its held-out prompts.
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
from lorafold.data.tokenizing import tokenized
from lorafold.engine import Sampling
from lorafold.errors import LorafoldError, RewardFailed, cut
from lorafold.evaluation.intervals import Interval, mean_interval
from lorafold.evaluation.rollouts import HELD_OUT, SLOTS, Completion, Rollouts
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.templates import in_words, within
from lorafold.files.terminal import Progress, print_lines, progress_bar, silent
from lorafold.generation import table_left
from lorafold.ops.dropout import key_of
from lorafold.rewards import Judged, Rewards

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READ = 3  # completions of the highest, and of the lowest rewards, that are to be read
SHOWN = 200  # characters of a completion that people are shown
KEPT = 2000  # characters of a prompt, and of a completion, that a shortened sample has


@dataclass(frozen=True)
class PolicySample:
    """One completion to read, with its place, its prompt and its reward; with several rewards also
    each that applies.
    """

    where: str
    prompt: Any
    completion: str
    reward: float
    ended: bool
    each: Mapping[str, float] = field(default_factory=dict)

    def shortened(self) -> dict[str, Any]:
        """The same with a prompt and a completion of bounded length, as text."""
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
        return asdict(self) | {name: cut(text, KEPT) for name, text in texts.items()}


@dataclass(frozen=True)
class Rewarded:
    """Groups of completions (n, k) of n prompts with their rewards, (n, k) each; NaN stands for a
    reward that does not apply, and where none does.
    """

    judged: Sequence[Judged]  # n k of them
    groups: Sequence[Sequence[Completion]]
    rewards: Tensor
    each: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        prompts: Sequence[TokenizedPrompt],
        groups: Sequence[Sequence[Completion]],
        rewards: Rewards,
        at_once: int | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Groups of one size as they are judged: all in one call, or `at_once` prompts a call, as
        it has a limit of time; then one of the completions must have a reward.
        """
        judged = [
            Judged(
                prompt.question, one.text, prompt.other_fields, f"{prompt.where}, completion {n}",
                prompt.conversation,
            )
            for prompt, group in zip(prompts, groups, strict=True)
            for n, one in enumerate(group, 1)
        ]  # fmt: skip
        sums, each = list[float | None](), dict[str, list[float | None]]()
        size = (at_once or len(prompts)) * len(groups[0])
        for start in range(0, len(judged), size):
            total, by_name = rewards(judged[start : start + size])
            sums += total
            each = {name: [*each.get(name, []), *x] for name, x in by_name.items()}
            progress(len(sums), len(judged))
        if at_once and sums.count(None) == len(sums):
            raise RewardFailed(
                f"rewards: found none for {judged[0].where} to {judged[-1].where}, as all returned"
                " None; expected a number for some completion"
            )
        tables = {name: _table(x, len(groups)) for name, x in each.items()}
        return cls(judged, groups, _table(sums, len(groups)), tables)

    def replaced(self, places: Sequence[int], other: Rewarded) -> Rewarded:
        """The same, with the groups at these places replaced by the groups of another, in order."""
        k, groups, judged = self.rewards.shape[1], [*self.groups], [*self.judged]
        for i, place in enumerate(places):
            groups[place] = other.groups[i]
            judged[place * k : (place + 1) * k] = other.judged[i * k : (i + 1) * k]
        rows = torch.tensor(places)
        rewards = self.rewards.index_copy(0, rows, other.rewards)
        each = {name: x.index_copy(0, rows, other.each[name]) for name, x in self.each.items()}
        return Rewarded(judged, groups, rewards, each)

    @property
    def completions(self) -> list[Completion]:
        """The completions of all groups, as in `judged`."""
        return [one for group in self.groups for one in group]

    @property
    def tokens(self) -> int:
        """The number of sampled tokens."""
        return sum(len(one.tokens) for one in self.completions)

    @property
    def interval(self) -> Interval | None:
        """The 95% interval of the mean reward; None for a single prompt."""
        return _interval(self.rewards)

    @property
    def alike(self) -> Tensor:
        """Whether all rewards of a group are the same, (n,)."""
        high, low = self.rewards.nan_to_num(-math.inf), self.rewards.nan_to_num(math.inf)
        return high.max(1).values <= low.min(1).values

    @cached_property
    def figures(self) -> dict[str, float]:
        """Means over all completions: the reward, and each of several rewards over the completions
        to which it applies; lengths and entropy, and the share of groups whose rewards are all
        equal.
        """
        completions, tokens = self.completions, self.tokens
        n = len(completions)
        each = {f"reward {name}": float(x.nanmean()) for name, x in self.each.items()}
        without = float(self.rewards.isnan().double().mean())
        return {
            "reward": float(self.rewards.nanmean()),
            **(each if len(each) > 1 else {}),
            **({"without a reward": without} if without else {}),
            "tokens a completion": tokens / n,
            "cut off": sum(not one.ended for one in completions) / n,
            "entropy": sum(-sum(one.logprobs) for one in completions) / max(1, tokens),
            "groups without signal": float(self.alike.double().mean()),
        }

    @property
    def to_read(self) -> list[dict[str, Any]]:
        """Some of the best completions, and of the worst, shortened."""
        return [one.shortened() for one in self.samples(READ, READ)]

    def samples(self, best: int, worst: int) -> list[PolicySample]:
        """Completions of the highest and of the lowest rewards, from the best to the worst."""
        rewards = self.rewards.flatten().tolist()
        several = self.each if len(self.each) > 1 else {}
        each = {name: x.flatten().tolist() for name, x in several.items()}
        order = [at for at, reward in enumerate(rewards) if not math.isnan(reward)]
        order.sort(key=lambda at: -rewards[at])
        completions, samples = self.completions, []
        for at in order[:best] + order[max(best, len(order) - worst) :]:
            one, ended = self.judged[at], completions[at].ended
            own = {name: x[at] for name, x in each.items() if not math.isnan(x[at])}
            samples.append(
                PolicySample(one.where, one.prompt, one.completion, rewards[at], ended, own)
            )
        return samples


def _table(values: Sequence[float | None], rows: int) -> Tensor:
    given = [math.nan if value is None else value for value in values]
    return torch.tensor(given, dtype=torch.float64).view(rows, -1)


def _interval(rewards: Tensor) -> Interval | None:  # (n, k)
    means = rewards.nanmean(1)
    return mean_interval(means[~means.isnan()].tolist())


@dataclass(frozen=True)
class RewardSettings:
    """How completions of held-out prompts are sampled: at most `max_length` tokens with the prompt,
    `group` completions each; temperature 1 samples as training does, 0 takes the likeliest tokens.
    """

    max_length: int
    max_new_tokens: int
    group: int = 1
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_length", "max_new_tokens", "group", "seed"):
            if not isinstance(value := getattr(self, name), int):
                raise LorafoldError(f"{name}: found {value!r:.40}, expected a whole number")
        checks = {
            f"group: found {self.group}, expected 1 or more": self.group >= 1,
            f"group: found {self.group} at temperature 0, expected 1, as all completions of a"
            " prompt would be the same": self.group <= 1 or self.temperature != 0,
            f"max_new_tokens: found {self.max_new_tokens}, expected 1 or more, and fewer than the"
            f" {self.max_length} of max_length": 1 <= self.max_new_tokens < self.max_length,
            f"seed: found {self.seed}, expected 0 to {2**32 - 1}": 0 <= self.seed < 2**32,
        }
        if wrong := [what for what, right in checks.items() if not right]:
            raise LorafoldError("; ".join(wrong))
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(temperature=self.temperature)


@dataclass(frozen=True)
class MeanReward:
    """The mean of one reward, without its weight, and its interval; None for a single prompt."""

    mean: float
    interval: Interval | None

    def __str__(self) -> str:
        return f"{self.mean:.4g}{within(self.interval)}"


@dataclass(frozen=True)
class RewardEvaluation(ShownInNotebooks):
    """What completions are worth, `group` of each of n prompts: the mean of their weighted sums of
    rewards, and each reward by its name.

    Attributes:
        tokens_a_completion: their mean length.
        cut_off: the share of completions that reached the most tokens, which are max_new_tokens.
        entropy: nats a token, estimated from the drawn tokens under the law they were drawn from.
        groups_without_signal: the share of prompts whose completions are all worth the same; None
            for one completion each.
        prompt_rewards: the mean of the completions of each prompt, in the order of the rows; None
            where no reward applies.
        samples: from the best to the worst, the first and the last ones of all completions.
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
    groups_without_signal: float | None
    prompt_rewards: tuple[float | None, ...]
    samples: tuple[PolicySample, ...]

    def __str__(self) -> str:
        return in_words("evaluation/rewards.jinja", found=self, short=_short, read=READ)


def evaluate_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    rewards: Rewards,
    settings: RewardSettings,
    console: Console | None = None,
) -> RewardEvaluation:
    """Measure the rewards of completions that a model generates with the adapters that are active
    on it. The model is not changed.
    """
    if not model.can_generate():
        raise LorafoldError(
            f"{type(model).__name__}: found a model that generates nothing, expected a causal"
            " language model for rewards"
        )
    length = min(table_left(model) or settings.max_length, settings.max_length)
    data = prompt_data(
        tokenized(rows, PromptEncoder(tokenizer), console), rows, length - settings.max_new_tokens
    )
    if console:
        print_lines(console, data.report)
    prompts, k = data.examples, settings.group
    rollouts = Rollouts(model, tokenizer, k, settings.max_new_tokens, settings.sampling)
    with closing(rollouts), progress_bar(console, "completions") as step:
        rollouts.open(max(lengths_of(prompts)), min(SLOTS, len(prompts) * k))
        key = key_of(settings.seed, HELD_OUT)
        groups = rollouts.draw([one.ids for one in prompts], key, k, step)
    with progress_bar(console, "rewards") as step:
        judged = Rewarded.of(prompts, groups, rewards, max(1, SLOTS // k), step)
    figures, means = judged.figures, judged.rewards.nanmean(1).tolist()
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
        groups_without_signal=figures["groups without signal"] if k > 1 else None,
        prompt_rewards=tuple(None if math.isnan(mean) else mean for mean in means),
        samples=tuple(judged.samples(READ, READ)),
    )


def _short(text: str) -> str:
    """A text on one line, by its beginning."""
    more = len(text) - SHOWN
    return repr(text[:SHOWN]) + (f" and {more:,} more characters" if more > 0 else "")
