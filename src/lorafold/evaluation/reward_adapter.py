"""A reward model that is an adapter on the policy's base, so no second base is loaded.

    chosen = RewardAdapter.of(RewardName.parse("0.5*adapter:reward"), base)
    with chosen.over(model, packing=True, console=console) as reward:
        reward(judged)                      r(x, y) of each completion y of its prompt x

The reward equals the score by `lorafold lab score`: prompt and completion are rendered by the chat
template, with an end of turn even if the completion was cut off. The reward model is a second tree
of modules on the policy's weights (`models.classifier`), with only the reward's adapters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lorafold.adapter import load_all
from lorafold.core.attach import Adapted
from lorafold.data.examples import CompletionEncoder, example_of
from lorafold.data.formats import PROMPT_ONLY, PROMPTS, Conversation
from lorafold.data.messages import normalize
from lorafold.data.preference_examples import BranchedRow, split_completion
from lorafold.data.render import ensure_chat_template
from lorafold.engine.adapters import base_adapter_contents
from lorafold.evaluation.reward_model_scores import BRADLEY_TERRY, WHOLE_CONVERSATION, scores_of
from lorafold.files.terminal import print_lines
from lorafold.identity import joined, of_adapter
from lorafold.models.checkpoint import original_weights
from lorafold.models.classifier import head_paths, padding_id, reward_model_on
from lorafold.models.loading import prequantized_storage
from lorafold.models.positions import positions_of
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base
from lorafold.resolve.base import REWARD_MODEL, model_kind
from lorafold.rewards import Calls, Judged, Reward, RewardName, Rewards
from lorafold.rewards.reward import failure
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import PrefixSupport, sharing_prefixes

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = "lorafold_reward"  # differs from the policy's, which is packed at the same time


@dataclass(frozen=True)
class RewardAdapter:
    """A saved reward model with its base adapters in `stack`, lowest first. Loading empties
    `stack`; `identity` is a hash of all its adapters.
    """

    name: str
    weight: float
    base: Base
    stack: list[SavedAdapter]
    identity: str

    @classmethod
    def of(cls, reward: RewardName, base: Base) -> Self:
        saved = SavedAdapter.open(Path(reward.text).expanduser())
        if (kind := model_kind(base, [saved])) != REWARD_MODEL:
            raise failure(
                reward.name, f"found an adapter of {kind}, expected an adapter of {REWARD_MODEL}"
            )
        contents = (base_adapter_contents(one, saved.path, sys.maxsize) for one in saved.over)
        below = [SavedAdapter.open(one) for one in contents]
        stack = [*below, saved]
        identity = joined([of_adapter(one) for one in stack])
        return cls(reward.name, reward.weight, base, stack, identity)

    @contextmanager
    def over(
        self, model: PreTrainedModel, packing: bool | str, console: Console
    ) -> Iterator[Reward]:
        tokenizer = self.base.tokenizer(self.stack)
        for notice in filter(None, (ensure_chat_template(tokenizer), self._dtype_notice(model))):
            print_lines(console, f"reward {self.name}: {notice}")
        pad, other = padding_id(tokenizer), self.base.allow_other_base
        shell, weights = reward_model_on(model, pad), None
        if _quantized(model) and prequantized_storage(self.base.source) is None:
            weights = original_weights(self.base.source)
        load_all(shell, self.stack, "reward", allow_other_base=other, base=weights)
        self.stack.clear()
        heads = head_paths(shell)
        if lacking := [p for p in heads if not isinstance(shell.get_submodule(p), Adapted)]:
            raise failure(self.name, f"the adapter has no {', '.join(lacking)}, expected a head")
        across = packing == "auto"
        with sharing_prefixes(shell, ATTENTION, across) if packing else nullcontext() as support:
            yield AdapterReward(self.name, self.weight, shell, tokenizer, support)

    def _dtype_notice(self, model: PreTrainedModel) -> str:
        trained_on = self.stack[-1].own_base.trained_on
        dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(str(model.dtype).split(".")[-1])
        if _quantized(model) or trained_on is None or trained_on.storage == dtype:
            return ""
        return f"trained with the base in {trained_on.storage}, but scores with the base in {dtype}"


@contextmanager
def rewards_over(
    model: PreTrainedModel, rewards: Sequence[str | Callable[..., Any]],
    adapters: Mapping[str, RewardAdapter], calls: Calls, packing: bool | str, console: Console,
) -> Iterator[Rewards]:  # fmt: skip
    """Yields the rewards; reward adapters are attached to the model that generates completions."""
    with ExitStack() as stack:
        loaded = {
            text: stack.enter_context(one.over(model, packing, console))
            for text, one in adapters.items()
        }
        judges = [loaded.get(one, one) if isinstance(one, str) else one for one in rewards]
        yield stack.enter_context(Rewards.of(*judges, calls=calls))


class AdapterReward:
    def __init__(
        self, name: str, weight: float, shell: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase, support: PrefixSupport | None,
    ) -> None:  # fmt: skip
        self.name, self.weight, self.shell = name, weight, shell
        self._loss = Preferences(shell, BRADLEY_TERRY, support, padding_id(tokenizer))
        self._encoder = CompletionEncoder(tokenizer, WHOLE_CONVERSATION)
        self._limit = positions_of(shell).table or math.inf

    def __call__(self, judged: Sequence[Judged]) -> list[float]:
        return scores_of(self._loss, self._texts(judged))[0][:, 0].tolist() if judged else []

    def close(self) -> None:
        """Does nothing, because the policy owns the weights."""

    def _texts(self, judged: Sequence[Judged]) -> list[BranchedRow]:
        """Tokenizes each prompt, with its completion as the only branch."""
        answered = []
        for one in judged:
            prompt = one.conversation
            if prompt is None:
                prompt = PROMPT_ONLY.extract(PROMPTS, {**one.row, "prompt": one.prompt})
            answer = normalize([{"role": "assistant", "content": one.completion}])
            turns = [*prompt.messages, *answer]
            answered.append(Conversation(turns, len(prompt.messages), prompt.tools))
        table = self._encoder.encode(answered, 0).to_pylist()
        # if the template rewrites earlier turns, a row's last entry has its last turn
        entries = {entry["row"]: entry for entry in table}
        problems = {entry["row"]: problem for entry in table if (problem := entry["problem"])}
        texts = []
        for number, one in enumerate(judged):
            ids = entries[number]["ids"]
            if problem := problems.get(number):
                raise failure(self.name, problem, [one])
            if len(ids) > self._limit:
                problem = f"found a text of {len(ids)} tokens, expected at most the {self._limit}"
                raise failure(self.name, f"{problem} positions of the model", [one])
            texts.append(split_completion(example_of(ids, entries[number]["spans"])))
        return texts


def _quantized(model: PreTrainedModel) -> bool:
    return getattr(model.config, "quantization_config", None) is not None
