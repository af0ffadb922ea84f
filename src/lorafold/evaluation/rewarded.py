"""Completions of prompts, and what they are worth.

    rewarded = Rewarded.of(prompts, rollouts.draw([prompt.ids for prompt in prompts], key), rewards)
    rewarded.figures                        the mean reward with its interval, lengths, entropy
    rewarded.samples(best=3, worst=3)       completions to read

Prompts are the units of intervals: the completions of one are not independent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from lorafold.data.to_complete import Prompt
from lorafold.errors import RewardFailed, cut
from lorafold.evaluation.intervals import Interval, mean_interval
from lorafold.evaluation.rollouts import Completion
from lorafold.rewards import Judged, Rewards

READ = 3  # completions of the highest, and of the lowest rewards, that are to be read
KEPT = 2000  # characters of a prompt, and of a completion, that a shortened sample has


@dataclass(frozen=True)
class Sample:
    """One completion to read: what it answers, where that stands, and what it is worth; with
    several rewards also to each of those that apply.
    """

    where: str
    prompt: Any
    completion: str
    reward: float
    ended: bool
    each: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The sample in one object."""
        return asdict(self)

    def shortened(self) -> dict[str, Any]:
        """The same with a prompt and a completion of bounded length, as text."""
        asked = self.prompt if isinstance(self.prompt, str) else "\n".join(map(_said, self.prompt))
        texts = {"prompt": asked, "completion": self.completion}
        return self.as_json() | {name: cut(text, KEPT) for name, text in texts.items()}


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
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Completion]],
        rewards: Rewards,
        at_once: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Self:
        """Completions as they are judged. Raises LorafoldError for a reward that fails, and, where
        they are judged in parts, if none of them has a reward.

        Args:
            groups: a group of completions of each prompt, all of one size.
            at_once: of how many prompts the completions are judged in one call, which has a limit
                of time; None for all.
            progress: is told how many completions are judged, of how many.
        """
        judged = [
            Judged(asked, one.text, row, f"{prompt.where}, completion {n}", conversation)
            for prompt, group in zip(prompts, groups, strict=True)
            for asked, row, conversation in ((prompt.asked, prompt.besides, prompt.conversation),)
            for n, one in enumerate(group, 1)
        ]
        sums, each = list[float | None](), dict[str, list[float | None]]()
        size = (at_once or len(prompts)) * len(groups[0])
        for start in range(0, len(judged), size):
            some, apart = rewards(judged[start : start + size])
            sums += some
            each = {name: [*each.get(name, []), *x] for name, x in apart.items()}
            progress(len(sums), len(judged))
        if at_once and sums.count(None) == len(sums):
            raise RewardFailed(
                f"rewards: found none for {judged[0].where} to {judged[-1].where}, as all returned"
                " None; expected a number for some completion"
            )
        of = {name: _table(x, len(groups)) for name, x in each.items()}
        return cls(judged, groups, _table(sums, len(groups)), of)

    def replaced(self, places: Sequence[int], other: Rewarded) -> Rewarded:
        """The same with the groups at these places those of another, in its order."""
        number = {place: i for i, place in enumerate(places)}
        k, groups, judged = self.rewards.shape[1], list[Sequence[Completion]](), list[Judged]()
        for place in range(len(self.groups)):
            own, at = (other, number[place]) if place in number else (self, place)
            groups.append(own.groups[at])
            judged += own.judged[at * k : (at + 1) * k]
        rows = torch.tensor(places)
        rewards = self.rewards.index_copy(0, rows, other.rewards)
        each = {name: x.index_copy(0, rows, other.each[name]) for name, x in self.each.items()}
        return Rewarded(judged, groups, rewards, each)

    @property
    def tokens(self) -> int:
        """How many were drawn."""
        return sum(len(one.tokens) for group in self.groups for one in group)

    @property
    def interval(self) -> Interval | None:
        """The 95% interval of the mean reward; None for a single prompt."""
        return _interval(self.rewards)

    @property
    def intervals(self) -> dict[str, Interval | None]:
        """That of the mean of each reward, by its name."""
        return {name: _interval(x) for name, x in self.each.items()}

    @property
    def alike(self) -> Tensor:
        """Whether all rewards of a group are the same, (n,)."""
        high, low = self.rewards.nan_to_num(-math.inf), self.rewards.nan_to_num(math.inf)
        return high.max(1).values <= low.min(1).values

    @cached_property
    def figures(self) -> dict[str, float]:
        """Means over all completions: the reward, with several each of them, of those to which it
        applies; what the completions are, and the share of groups whose rewards are all alike.
        """
        drawn = [one for group in self.groups for one in group]
        tokens = self.tokens
        apart = {f"reward {name}": float(x.nanmean()) for name, x in self.each.items()}
        without = float(self.rewards.isnan().double().mean())
        return {
            "reward": float(self.rewards.nanmean()),
            **(apart if len(apart) > 1 else {}),
            **({"without a reward": without} if without else {}),
            "tokens a completion": tokens / len(drawn),
            "cut off": sum(not one.ended for one in drawn) / len(drawn),
            "entropy": sum(-sum(one.logprobs) for one in drawn) / max(1, tokens),
            "groups without signal": float(self.alike.double().mean()),
        }

    @property
    def to_read(self) -> list[dict[str, Any]]:
        """Some of the best completions, and of the worst, shortened."""
        return [one.shortened() for one in self.samples(READ, READ)]

    def samples(self, best: int, worst: int) -> list[Sample]:
        """Completions of the highest and of the lowest rewards, from the best to the worst."""
        drawn = [one for group in self.groups for one in group]
        found = self.rewards.flatten().tolist()
        several = self.each if len(self.each) > 1 else {}
        each = {name: x.flatten().tolist() for name, x in several.items()}
        judged = [at for at, reward in enumerate(found) if not math.isnan(reward)]
        order = sorted(judged, key=lambda at: -found[at])
        shown = sorted(
            {*range(len(order))[:best], *range(len(order))[max(0, len(order) - worst) :]}
        )
        return [
            Sample(
                one.where, one.prompt, one.completion, found[at], drawn[at].ended,
                {name: x[at] for name, x in each.items() if not math.isnan(x[at])},
            )
            for at in (order[place] for place in shown)
            for one in (self.judged[at],)
        ]  # fmt: skip


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"{message.get('role')}: {text}"


def _table(values: Sequence[float | None], rows: int) -> Tensor:
    given = [math.nan if value is None else value for value in values]
    return torch.tensor(given, dtype=torch.float64).view(rows, -1)


def _interval(rewards: Tensor) -> Interval | None:  # (n, k)
    means = rewards.nanmean(1)
    return mean_interval(means[~means.isnan()].tolist())
