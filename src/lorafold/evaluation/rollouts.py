"""Completions that a policy draws by the engine, while it trains from the very weights that train.

    rollouts = Rollouts(model, tokenizer, group=8, longest=256)
    rollouts.open(prompt=64, slots=64)
    rollouts.draw(prompts, key)             a group of completions of each prompt

The engine has a second shell of the model (`core.shared_tensors`), so that both stay open. What
trains is adopted anew for each step: the engine copies its factors and keeps nothing of earlier
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.autograd.graph import increment_version

from lorafold.core.attach import only, selection_of
from lorafold.core.shared_tensors import twin
from lorafold.engine import Engine, EventStream, Request, Sampling, Token
from lorafold.engine.operations import lacks, unsteady
from lorafold.errors import LorafoldError
from lorafold.generation import end_tokens, text_of
from lorafold.ops.dropout import key_of
from lorafold.runtime.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY = "policy"  # what is active on the model, as the engine knows it
SLOTS = 64  # completions that are drawn at a time
HELD_OUT = 2**62  # the step whose draws are those of held-out prompts
AS_TRAINED = Sampling(temperature=1.0)  # among all tokens


@dataclass(frozen=True)
class Completion:
    """One completion: its tokens, the last of which ends it if it `ended`, the log-probability in
    nats with which each was drawn, and its text.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class RolloutSize:
    """How many completions are drawn at a time (`slots`), how many a prompt has, and the most
    tokens of a prompt and of one completion.
    """

    slots: int
    group: int
    prompt: int
    longest: int


class Rollouts:
    """Draws completions, once it is `open`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        group: int,
        longest: int,
        sampling: Sampling = AS_TRAINED,
        exact: bool = False,
    ) -> None:
        self.shell, self.names = twin(model), selection_of(model).names
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.moving = [p for name, p in self.shell.named_parameters() if name in trained]
        self.tokenizer, self.ends = tokenizer, end_tokens(model, tokenizer)
        self.group, self.longest, self.sampling, self.exact = group, longest, sampling, exact
        self._stack = ExitStack()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine over the shell."""
        assert self._engine is not None
        return self._engine

    def open(self, prompt: int, slots: int) -> bool:
        """Open the engine. Returns whether it is to be `exact`, which this processor's products are
        not.
        """
        if self.exact and (why := lacks(self.shell.device.type)):
            raise LorafoldError(f"exact: {why}")
        nbytes = sum(p.nbytes for p in self.shell.parameters())
        self._stack.enter_context(only(self.shell))
        engine = Engine(
            self.shell, self.tokenizer, slots=slots, length=prompt + self.longest, beyond=True,
            fast=self.exact or 2 * nbytes <= free_bytes(self.shell.device),
            as_trained=self.exact,
        )  # fmt: skip
        self._engine = self._stack.enter_context(engine)
        if self.exact and not engine.slotted:
            raise LorafoldError(f"exact: found a model that draws apart: {engine.structure.why}")
        return self.exact and unsteady(
            [(shape.out, shape.inn) for shape in engine.structure.shapes], self.shell.dtype
        )

    def close(self) -> None:
        """Close the engine."""
        self._stack.close()

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        key: int,
        group: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Completion]]:
        """A group of completions of each prompt, under the weights as they are now."""
        # a fused optimizer leaves the versions, by which a method knows that what it kept is stale
        increment_version(self.moving)
        self.engine.adopt(POLICY, self.names)
        k = group or self.group
        streams = [
            [self._stream(prompt, key, i * k + j) for j in range(k)]
            for i, prompt in enumerate(prompts)
        ]
        every = [stream for group in streams for stream in group]
        running = every

        def after() -> None:
            nonlocal running
            running = [stream for stream in running if stream.ended is None]
            progress(len(every) - len(running), len(every))

        self.engine.run(after)
        # keys and values are in nobody's way then, nor does what is drawn bear on later rounding
        self.engine.forget()
        return [[self._completion(stream) for stream in group] for group in streams]

    def draw_held_out(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        group: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Completion]]:
        """The same of held-out prompts, whose draws follow from a run's seed and from no step."""
        return self.draw(prompts, key_of(seed, HELD_OUT), group, progress)

    def _stream(self, prompt: Sequence[int], key: int, n: int) -> EventStream:
        sampling = replace(self.sampling, logprobs=0, seed=key_of(key, n))
        asked = Request(
            str(n), tuple(prompt), self.longest, POLICY, sampling, self.ends, keep_end=True
        )
        return self.engine.submit(asked)

    def _completion(self, stream: EventStream) -> Completion:
        end = stream.result()
        if end.reason == "failed":
            raise LorafoldError(f"a completion can't be computed: {end.message}")
        drawn = [event for event in stream.so_far() if isinstance(event, Token)]
        logprobs = tuple(float(token.drawn_logprob or 0.0) for token in drawn)
        text = text_of(self.tokenizer, end.tokens)
        return Completion(end.tokens, logprobs, text, end.reason == "end")
