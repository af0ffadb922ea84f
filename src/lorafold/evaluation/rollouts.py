"""Rollouts: completions sampled by the engine from the current weights during training.

    rollouts = Rollouts(model, tokenizer, group=8, max_new_tokens=256)
    rollouts.open(prompt=64, slots=64)
    rollouts.sample(prompts, key)           a group of completions for each prompt

The engine uses a second tree of modules with the same tensors (`core.shared_tensors`), so the model
can still be trained. It copies the trained factors before it samples, and drops its KV cache
afterwards.
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
from lorafold.files.terminal import Progress, no_progress
from lorafold.generation import decode, end_tokens
from lorafold.ops.dropout import key_of
from lorafold.runtime.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY = "policy"  # the engine's name of the active adapters
SLOTS = 64  # completions sampled at a time
HELD_OUT = 2**62  # the step number in the random keys of held-out prompts
AS_TRAINED = Sampling(temperature=1.0)


@dataclass(frozen=True)
class Completion:
    """A sampled completion: its tokens (with the end token if it `ended`), their log-probabilities
    in nats at the time of sampling, and its text.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class RolloutSize:
    """The number of completions sampled at a time (`slots`) and per prompt (`group`), and the
    maximum number of tokens of a prompt and of a completion.
    """

    slots: int
    group: int
    prompt: int
    max_new_tokens: int


class Rollouts:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        group: int,
        max_new_tokens: int,
        sampling: Sampling = AS_TRAINED,
        exact: bool = False,
    ) -> None:
        self.shell, self.names = twin(model), selection_of(model).names
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.trainable = [p for name, p in self.shell.named_parameters() if name in trained]
        self.tokenizer, self.ends = tokenizer, end_tokens(model, tokenizer)
        self.group, self.max_new_tokens = group, max_new_tokens
        self.sampling, self.exact = sampling, exact
        self._stack = ExitStack()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def open(self, prompt: int, slots: int) -> bool:
        """Opens the engine for prompts of at most `prompt` tokens. Returns whether `exact` is set
        but this CPU's matmuls are not batch invariant.
        """
        if self.exact and (why := lacks(self.shell.device.type)):
            raise LorafoldError(f"exact: {why}")
        nbytes = sum(p.nbytes for p in self.shell.parameters())
        self._stack.enter_context(only(self.shell))
        engine = Engine(
            self.shell, self.tokenizer, slots=slots, length=prompt + self.max_new_tokens,
            beyond=True, fast=self.exact or 2 * nbytes <= free_bytes(self.shell.device),
            as_trained=self.exact,
        )  # fmt: skip
        self._engine = self._stack.enter_context(engine)
        if self.exact and not engine.is_batched:
            reason = engine.structure.unbatched_reason
            raise LorafoldError(f"exact: not supported by this model: {reason}")
        return self.exact and unsteady(
            [(shape.out, shape.in_features) for shape in engine.structure.shapes], self.shell.dtype
        )

    def close(self) -> None:
        self._stack.close()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        key: int,
        group: int | None = None,
        progress: Progress = no_progress,
    ) -> list[list[Completion]]:
        """Samples a group of completions for each prompt with the current weights. The random
        numbers depend only on the key and on the indices of prompt and completion.
        """
        # fused optimizers don't change tensor versions, by which methods detect stale caches
        increment_version(self.trainable)
        self.engine.adopt(POLICY, self.names)
        k = group or self.group
        requests = [
            Request(
                str(n), tuple(prompts[n // k]), self.max_new_tokens, POLICY,
                replace(self.sampling, logprobs=0, seed=key_of(key, n)), self.ends, keep_end=True,
            )
            for n in range(len(prompts) * k)
        ]  # fmt: skip
        streams = [*map(self.engine.submit, requests)]

        def report_progress() -> None:
            progress(sum(stream.ended is not None for stream in streams), len(streams))

        self.engine.run(report_progress)
        # frees the KV cache, and makes later samples independent of these
        self.engine.forget()
        completions = [*map(self._completion, streams)]
        return [completions[i : i + k] for i in range(0, len(completions), k)]

    def _completion(self, stream: EventStream) -> Completion:
        end = stream.result()
        if end.reason == "failed":
            raise LorafoldError(f"sampling a completion failed: {end.message}")
        tokens = [event for event in stream.so_far() if isinstance(event, Token)]
        logprobs = tuple(float(token.drawn_logprob or 0.0) for token in tokens)
        return Completion(
            end.tokens, logprobs, decode(self.tokenizer, end.tokens), end.reason == "end"
        )
