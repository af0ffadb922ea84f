"""Completions that a policy samples by the engine while it trains, from the weights that train.

    rollouts = Rollouts(model, tokenizer, group=8, longest=256)
    rollouts.open(prompt=64, slots=64)
    rollouts.draw(prompts, key)             a group of completions of each prompt

The engine has a second shell of the model (`core.shared_tensors`), so that both stay open. It
copies the factors that train anew for each step and keeps nothing of earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.autograd.graph import increment_version

from lorafold.core.attach import only, selection_of
from lorafold.core.shared_tensors import twin
from lorafold.engine import Engine, EventStream, Request, Sampling, Token
from lorafold.engine.operations import lacks, unsteady
from lorafold.errors import LorafoldError
from lorafold.files.terminal import Progress, silent
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
    """One completion: its tokens, the last of which ends it if it `ended`, the log-probability of
    each in nats when it was sampled, and its text.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class RolloutSize:
    """How many completions are sampled at a time (`slots`), how many a prompt has, and the most
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
        """Open the engine for prompts of at most so many tokens. Returns whether it is to be
        `exact` and this processor's matmuls are not.
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
        progress: Progress = silent,
    ) -> list[list[Completion]]:
        """A group of completions of each prompt's token ids, under the weights as they are now. The
        samples follow from the key and from the places of prompt and completion.
        """
        # a fused optimizer leaves the versions, by which a method knows that its cache is stale
        increment_version(self.moving)
        self.engine.adopt(POLICY, self.names)
        k = group or self.group
        streams = []
        for n in range(len(prompts) * k):
            sampling = replace(self.sampling, logprobs=0, seed=key_of(key, n))
            ids = tuple(prompts[n // k])
            streams.append(
                self.engine.submit(
                    Request(str(n), ids, self.longest, POLICY, sampling, self.ends, keep_end=True)
                )
            )
        running = streams

        def after() -> None:
            nonlocal running
            running = [stream for stream in running if stream.ended is None]
            progress(len(streams) - len(running), len(streams))

        self.engine.run(after)
        # the KV cache is in nobody's way then, nor do the samples bear on later rounding
        self.engine.forget()
        completions = [*map(self._completion, streams)]
        return [completions[i : i + k] for i in range(0, len(completions), k)]

    def _completion(self, stream: EventStream) -> Completion:
        end = stream.result()
        if end.reason == "failed":
            raise LorafoldError(f"a completion can't be computed: {end.message}")
        tokens = [event for event in stream.so_far() if isinstance(event, Token)]
        logprobs = tuple(float(token.drawn_logprob or 0.0) for token in tokens)
        return Completion(
            end.tokens, logprobs, text_of(self.tokenizer, end.tokens), end.reason == "end"
        )
