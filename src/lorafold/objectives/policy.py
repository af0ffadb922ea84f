"""Objectives of policies: completions that the model draws itself, rewards, and a law over them.

A step draws a group of completions of each of its prompts, has them judged, and learns from the
groups whose rewards differ. What it draws follows from the weights, the run's seed and the step, so
a run that is resumed goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from lorafold.core.undropped import undropped
from lorafold.data.account import account_of
from lorafold.data.arrow import lengths_of
from lorafold.data.examples import WHOLE
from lorafold.data.feed import Feed, StoredFeed
from lorafold.data.render import Rendering, ensure_chat_template
from lorafold.data.stored import Rows
from lorafold.data.to_complete import Prompt, PromptData, Prompts, prompt_data
from lorafold.data.tokenizing import Encoder
from lorafold.errors import LorafoldError
from lorafold.evaluation import Measured
from lorafold.evaluation.reward_adapter import RewardAdapter
from lorafold.evaluation.rewarded import Rewarded
from lorafold.evaluation.rollouts import SLOTS, Completion, Drawn, Rollouts
from lorafold.objectives import OBJECTIVES, Declared
from lorafold.objectives.laws import class_of, made
from lorafold.objectives.objective import Asked, Objective, given_options
from lorafold.ops.philox import key_of
from lorafold.rewards import Rewards, digest_of
from lorafold.rewards.naming import adapter_in
from lorafold.step import policy_laws
from lorafold.step.branches import Branching, branching
from lorafold.step.policy import Policy, Rollout
from lorafold.step.policy_laws import STRICT, PolicyLaw

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 3  # completions that are shown where rewards never vary
LARGEST = 1e12  # an advantage: squares of gradients times it are still numbers of fp32
QUIET = "steps without signal"  # of the first ones, without a group whose rewards differ
PATIENCE = 10  # steps without a group whose rewards differ, before that is told


@checked(frozen=True, config=STRICT)
class Drawing:
    """What is drawn of a prompt, and what judges it.

    Args:
        group: completions of a prompt.
        max_new_tokens: the most tokens of one.
        truncated: whether completions that were cut off there count in the loss.
        rewards: names as `lorafold.rewards.reward_of` reads them.
        reward_seconds: the seconds that a call of one may take.
    """

    group: Annotated[int, Field(ge=2)] = 8
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    truncated: Literal["counted", "masked"] = "counted"
    rewards: tuple[str, ...] = ()
    reward_seconds: Annotated[float, Field(gt=0)] = 30.0


def chosen(
    objective: str, beta: float | None, options: Mapping[str, Any]
) -> tuple[PolicyLaw, Drawing]:
    """The law of an objective of policies, and what it draws.

    Raises LorafoldError for an option that neither has, or a value out of its range.
    """
    given = given_options(beta, options)
    own = {field.name for field in fields(Drawing)}
    drawing = made(Drawing, {k: v for k, v in given.items() if k in own}, objective)
    kind: type[PolicyLaw] = class_of(OBJECTIVES[objective], policy_laws)
    law = made(kind, {k: v for k, v in given.items() if k not in own}, objective)
    return law, drawing


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
        super().__init__(model, law, how, pad_id, rollouts.longest)
        self.rollouts, self.rewards = (rollouts,), rewards  # in a tuple: it has a model of its own
        self.told: dict[str, float] = {}
        self.counts[QUIET] = 0

    def figures(self) -> dict[str, float]:
        found, self.told = self.told, {}
        return found | super().figures()


@dataclass(frozen=True)
class PolicyObjective(Objective):
    """Learning from rewards, by a law."""

    law: PolicyLaw
    drawing: Drawing
    given: tuple[Callable[..., Any], ...] = ()  # rewards that are functions of Python
    seed: int = 0
    adapters: Mapping[str, RewardAdapter] = field(default_factory=dict)  # by what names them

    @classmethod
    def of(cls, asked: Asked) -> Self:
        law, drawing = chosen(asked.name, asked.beta, asked.options)
        if not (drawing.rewards or asked.rewards):
            raise LorafoldError(
                f"objective {asked.name}: found no reward, expected one or several: --reward"
                " FILE.py:FUNCTION, or rewards= in Python"
            )
        named = [text for text in drawing.rewards if adapter_in(text)]
        adapters = {text: RewardAdapter.of(text, asked.base) for text in named}
        return cls(law, drawing, tuple(asked.rewards), asked.seed, adapters)

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        kinds = (class_of(declared, policy_laws), Drawing)
        return {field.name: field.default for kind in kinds for field in fields(kind)}

    @property
    def reads(self) -> Sequence[tuple[str, Path]]:
        found = [(name, saved) for name, one in self.adapters.items() for saved in one.stack]
        return [(f"for --reward {name}", saved.path) for name, saved in found]

    @property
    def identity(self) -> Mapping[str, Any]:
        # an object's own repr may have its address, which another process does not have
        names = [getattr(fn, "__qualname__", type(fn).__qualname__) for fn in self.given]
        files = {name: digest_of(name) for name in self.drawing.rewards}
        files |= {name: one.identity for name, one in self.adapters.items()}
        return {"rewards": files | dict.fromkeys(names, "")}

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return ensure_chat_template(tokenizer) or account_of(tokenizer).line

    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return Prompts(tokenizer)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> PromptData:
        return prompt_data(table, rows, max_length - self.drawing.max_new_tokens)

    def draws(self, feed: Feed, held_out: Any) -> Drawn:
        assert isinstance(feed, StoredFeed)
        lengths = [*lengths_of(feed.examples), *(lengths_of(held_out.examples) if held_out else [])]
        slots = min(SLOTS, feed.batch * self.drawing.group)
        return Drawn(slots, self.drawing.group, max(lengths), self.drawing.max_new_tokens)

    def trained(self, example: Prompt) -> Rollout:
        """A group of completions of that prompt, as long as they may be."""
        own, k = (0,) * self.drawing.max_new_tokens, self.drawing.group
        return Rollout.of(example.ids, [own] * k, [()] * k, [0.0] * k, [True] * k)

    def preview(self, example: Prompt, tokenizer: PreTrainedTokenizerBase) -> Text:
        from rich.text import Text

        text = tokenizer.decode(list(example.ids), skip_special_tokens=False)
        return Text(str(text), style="dim")

    @contextmanager
    def loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packing: bool,
        console: Console,
    ) -> Iterator[Playing]:
        drawing = self.drawing
        with ExitStack() as stack:
            over = {
                text: stack.enter_context(one.over(model, packing, console))
                for text, one in self.adapters.items()
            }
            named = [over.get(text, text) for text in drawing.rewards]
            rewards = stack.enter_context(
                Rewards.of(*named, *self.given, limit=drawing.reward_seconds)
            )
            rollouts = Rollouts(model, tokenizer, drawing.group, drawing.max_new_tokens)
            stack.callback(rollouts.close)
            if dropped := stack.enter_context(undropped(model)):
                told = f"dropout: found {dropped:g} in the model or its adapters, taken as 0"
                console.print(f"{told}: completions are drawn without", highlight=False)
            how = stack.enter_context(branching(model)) if packing else None
            yield Playing(model, self.law, how, tokenizer.pad_token_id or 0, rollouts, rewards)

    def refer(
        self, loss: Playing, feed: Feed, held_out: Any, below: Sequence[str], console: Console
    ) -> tuple[Feed, Any]:
        """Open what draws, for the longest prompt of both."""
        drawn = self.draws(feed, held_out)
        loss.rollouts[0].open(drawn.prompt, drawn.slots)
        return feed, held_out

    def examples(self, step: int, planned: Sequence[Prompt], loss: Playing) -> Sequence[Rollout]:
        """The groups that the model draws of the planned prompts, without those whose rewards are
        alike, unless they are held to the reference.
        """
        rollouts = loss.rollouts[0]
        groups = rollouts.draw([prompt.ids for prompt in planned], key_of(self.seed, step))
        found = Rewarded.of(planned, groups, loss.rewards)
        advantages = self.law.advantages(found.rewards)
        if not bool((advantages.abs() <= LARGEST).all()):
            raise LorafoldError(
                f"rewards: found an advantage of {float(advantages.abs().max()):.3g} in the"
                f" completions of {planned[0].where} to {planned[-1].where}, expected at most"
                f" {LARGEST:g}: give the reward a weight, as in 1e-6*FILE.py:FUNCTION"
            )
        counts = torch.tensor([any(map(self._counts, group)) for group in groups])
        loss.told = found.figures
        learns = torch.tensor(
            [
                any(self._counts(one) and a for one, a in zip(group, own, strict=True))
                for group, own in zip(groups, advantages.tolist(), strict=True)
            ]
        )
        if step < PATIENCE and not bool(learns.any()):
            loss.counts[QUIET] += 1
            if loss.counts[QUIET] == PATIENCE:
                raise LorafoldError(self._constant(found, bool(counts.any())))
        # a policy that is its reference still has nothing to be held back from
        keep = learns | (counts & (self.law.beta > 0) & (bool(learns.any()) or step > 0))
        return [
            self._rollout(prompt, group, a)
            for prompt, group, a, kept in zip(
                planned, groups, advantages.tolist(), keep.tolist(), strict=True
            )
            if kept
        ]

    def measure(self, loss: Playing, held_out: PromptData) -> Measured:
        """The mean reward of one completion of each prompt, always of the same draws, with its
        interval; the loss is minus that.
        """
        rollouts, prompts = loss.rollouts[0], held_out.examples
        groups = rollouts.draw_held_out([prompt.ids for prompt in prompts], self.seed)
        found = Rewarded.of(prompts, groups, loss.rewards, at_once=SLOTS)
        reward, interval = found.figures["reward"], found.interval
        within = "" if interval is None else f" (95%: {interval[0]:.3f} to {interval[1]:.3f})"
        # of a group of one all rewards are alike
        own = {k: v for k, v in found.figures.items() if k != "groups without signal"}
        figures = own | {"reward_interval": interval}
        return Measured(-reward, figures, f", reward {reward:.3f}{within}")

    def _rollout(self, prompt: Prompt, group: list[Completion], advantages: list[float]) -> Rollout:
        return Rollout.of(
            prompt.ids, [one.tokens for one in group], [one.logprobs for one in group], advantages,
            [self._counts(one) for one in group],
        )  # fmt: skip

    def _counts(self, one: Completion) -> bool:
        return one.ended or self.drawing.truncated == "counted"

    def _constant(self, found: Rewarded, counted: bool) -> str:
        if not counted:
            return (
                f"truncated=masked: found all completions of step {PATIENCE} cut off at"
                f" max_new_tokens={self.drawing.max_new_tokens}, and none to learn from in the"
                f" first {PATIENCE} steps; expected some that end: more max_new_tokens, or counted"
            )
        samples = "; ".join(
            f"{one.where}: {one.completion[:80]!r} has {one.reward:g}"
            for one in found.samples(SAMPLES, 0)
        )
        return (
            f"rewards: found the same for all completions of each prompt in the first {PATIENCE}"
            f" steps, so there is nothing to learn: {samples}"
        )
