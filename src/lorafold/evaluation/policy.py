"""How good a policy is: what the completions are worth that it draws of held-out prompts.

    reward = 1/n sum_i r_i          r_i is the mean reward of the completions of prompt i

The completions of a prompt are not independent, so the units of the 95% intervals are prompts. With
one completion each and a run's seed, they are those that the run measures on its held-out prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorafold.data.arrow import lengths_of
from lorafold.data.stored import Rows
from lorafold.data.to_complete import Prompts, prompt_data
from lorafold.data.tokenizing import tokenized
from lorafold.engine import Sampling
from lorafold.errors import LorafoldError
from lorafold.evaluation.held_out import progress_bar
from lorafold.evaluation.intervals import Interval
from lorafold.evaluation.rewarded import READ, Rewarded, Sample
from lorafold.evaluation.rollouts import SLOTS, Rollouts
from lorafold.files.card import within
from lorafold.files.page import Shown
from lorafold.generation import table_left
from lorafold.rewards import Rewards

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 200  # characters of a completion that people are shown


@dataclass(frozen=True)
class RewardSettings:
    """What is drawn of held-out prompts. Raises LorafoldError for what can't be drawn.

    Args:
        max_length: The most tokens of a prompt and its completion.
        max_new_tokens: The most tokens of a completion.
        group: How many completions a prompt has.
        temperature: 1 draws as training does; 0 takes the most likely tokens.
        seed: What the draws follow from, as those of a run do from its seed.
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
class RewardEvaluation(Shown):
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
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, found: Rewarded, max_new_tokens: int) -> RewardEvaluation:
        """The figures of completions with their rewards.

        Args:
            max_new_tokens: The most tokens that a completion could have.
        """
        figures, group = found.figures, found.rewards.shape[1]
        return cls(
            reward=figures["reward"],
            reward_interval=found.interval,
            rewards={
                name: MeanReward(float(x.nanmean()), found.intervals[name])
                for name, x in found.each.items()
            },
            n=len(found.groups),
            group=group,
            max_new_tokens=max_new_tokens,
            tokens_a_completion=figures["tokens a completion"],
            cut_off=figures["cut off"],
            entropy=figures["entropy"],
            groups_without_signal=figures["groups without signal"] if group > 1 else None,
            prompt_rewards=tuple(
                None if math.isnan(mean) else mean for mean in found.rewards.nanmean(1).tolist()
            ),
            samples=tuple(found.samples(READ, READ)),
        )

    def as_json(self) -> dict[str, Any]:
        """All figures and samples."""
        return asdict(self)

    def __str__(self) -> str:
        each = f"{self.group} completion{'s' * (self.group > 1)} each"
        lines = [
            f"{self.n} prompts, {each}: reward {MeanReward(self.reward, self.reward_interval)}",
            *(f"reward {name} {x}" for name, x in self.rewards.items() if len(self.rewards) > 1),
            f"{self.tokens_a_completion:.1f} tokens a completion, {self.cut_off:.1%} cut off at"
            f" {self.max_new_tokens}, entropy {self.entropy:.3f} nats a token",
        ]
        if self.groups_without_signal is not None:
            lines[-1] += f", groups without signal {self.groups_without_signal:.1%}"
        shown = [_told(one) for one in self.samples]
        if self.n * self.group > len(shown):
            shown.insert(READ, "...")
        return "\n".join([*lines, "completions, from the best to the worst:", *shown])


def evaluate_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    rewards: Rewards,
    settings: RewardSettings,
    console: Console | None = None,
) -> RewardEvaluation:
    """Measure what completions are worth that a model draws with the adapters that are active on
    it. The model stays as it is.

    Args:
        rows: All of shapes that give prompts; their other fields are the rewards'.
        settings: What is drawn.
        console: For progress and a report of the prompts; None is quiet.

    Raises LorafoldError for a model that generates nothing, a prompt that is too long, a completion
    that can't be computed, and a reward that fails.
    """
    if not model.can_generate():
        raise LorafoldError(
            f"{type(model).__name__}: found a model that generates nothing, expected a causal"
            " language model for rewards"
        )
    length = min(table_left(model) or settings.max_length, settings.max_length)
    table = tokenized(rows, Prompts(tokenizer), console)
    data = prompt_data(table, rows, length - settings.max_new_tokens)
    if console:
        console.print(str(data.report), highlight=False)
    prompts, k = data.examples, settings.group
    rollouts = Rollouts(model, tokenizer, k, settings.max_new_tokens, settings.sampling)
    with closing(rollouts), progress_bar(console, "completions") as step:
        rollouts.open(max(lengths_of(prompts)), min(SLOTS, len(prompts) * k))
        groups = rollouts.draw_held_out([one.ids for one in prompts], settings.seed, k, step)
    with progress_bar(console, "rewards") as step:
        found = Rewarded.of(prompts, groups, rewards, max(1, SLOTS // k), step)
    return RewardEvaluation.of(found, settings.max_new_tokens)


def _told(one: Sample) -> str:
    asked = f" {_short(one.prompt)} ->" if isinstance(one.prompt, str) else ""
    end = "" if one.ended else ", cut off"
    return f"{one.reward:8.4g}  {one.where}:{asked} {_short(one.completion)}{end}"


def _short(text: str) -> str:
    """A text on one line, by its beginning."""
    more = len(text) - SHOWN
    return repr(text[:SHOWN]) + (f" and {more:,} more characters" if more > 0 else "")
