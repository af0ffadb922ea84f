"""Rollouts: completions sampled by the engine from the current weights during training.

    rollouts = Rollouts(model, tokenizer, group=8, max_new_tokens=256)
    rollouts.open(prompt=64, slots=64)
    rollouts.sample(prompts, key)           a group of completions for each prompt

The engine uses a second tree of modules with the same tensors (`core.shared_tensors`), so the model
can still be trained. It copies the trained factors before it samples, and drops its KV cache
afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.autograd.graph import increment_version

from lorafold.core.attach import only, selection_of
from lorafold.core.shared_tensors import twin
from lorafold.data.prompts import TokenizedPrompt
from lorafold.engine import Engine, EventStream, Request, Sampling, Token
from lorafold.engine.operations import lacks, unsteady
from lorafold.errors import LorafoldError
from lorafold.evaluation.episodes import Episode, EpisodeOver
from lorafold.files.terminal import Progress, no_progress
from lorafold.generation import end_tokens
from lorafold.ops.dropout import key_of
from lorafold.rewards.environments import Environment, EnvironmentInput, single_turn
from lorafold.runtime.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
POLICY = "policy"  # the engine's name of the active adapters
SLOTS = 64  # completions sampled at a time
HELD_OUT = 2**62  # the step number in the random keys of held-out prompts
AS_TRAINED = Sampling(temperature=1.0)


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
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, group: int,
        max_new_tokens: int, sampling: Sampling = AS_TRAINED, exact: bool = False,
        environment: Environment = single_turn, turns: int = 1,
    ) -> None:  # fmt: skip
        self.shell, self.names = twin(model), selection_of(model).names
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.trainable = [p for name, p in self.shell.named_parameters() if name in trained]
        self.tokenizer, self.ends = tokenizer, end_tokens(model, tokenizer)
        self.group, self.max_new_tokens = group, max_new_tokens
        self.sampling, self.exact = sampling, exact
        self.environment, self.turns = environment, turns
        self.has_continued, self.has_warned = False, False
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
        prompts: Sequence[TokenizedPrompt],
        key: int,
        group: int | None = None,
        progress: Progress = no_progress,
    ) -> list[list[Episode]]:
        """Samples a group of completions for each prompt with the current weights. The random
        numbers depend only on the key and on the indices of prompt and completion.

        Episodes are sampled turn by turn: all that go on together, so that the result does not
        depend on how long an environment takes.
        """
        # fused optimizers don't change tensor versions, by which methods detect stale caches
        increment_version(self.trainable)
        self.engine.adopt(POLICY, self.names)
        k = group or self.group
        rollouts = [
            Episode(self.tokenizer, prompt, self.turns, self.max_new_tokens)
            for prompt in prompts
            for _ in range(k)
        ]
        inputs = {
            n: one.beginning(key_of(key, n // k), self.sampling.temperature)
            for n, one in enumerate(rollouts)
        }
        streams = dict[int, EventStream]()

        def report_progress() -> None:
            left = len(inputs) + sum(stream.ended is None for stream in streams.values())
            progress(len(rollouts) - left, len(rollouts))

        while inputs:
            items = [
                EnvironmentInput(f"{rollouts[n].prompt.where}, completion {n % k + 1}", n, values)
                for n, values in sorted(inputs.items())
            ]
            inputs, streams = {}, {}
            for (_, n, _), request in zip(items, self.environment(items), strict=True):
                one = rollouts[n]
                try:
                    if (turn := one.next_turn(request)) is not None:
                        seed = key_of(key, n + (one.turns << 32))
                        streams[n] = self._submit(n, *turn, seed)
                except EpisodeOver as over:
                    one.ended = False
                    inputs[n] = {"over": str(over)}
                except LorafoldError as error:
                    inputs[n] = {"error": str(error)}
            self.engine.run(report_progress)
            inputs |= {n: rollouts[n].add_turn(*_sampled(one)) for n, one in streams.items()}
        # frees the KV cache, and makes later samples independent of these
        self.engine.forget()
        self._check(rollouts)
        return [rollouts[i : i + k] for i in range(0, len(rollouts), k)]

    def _submit(self, n: int, ids: tuple[int, ...], most: int, seed: int) -> EventStream:
        sampling = replace(self.sampling, logprobs=0, seed=seed)
        return self.engine.submit(
            Request(str(n), ids, most, POLICY, sampling, self.ends, keep_end=True)
        )

    def _check(self, rollouts: Sequence[Episode]) -> None:
        """Raises if an environment never called the model, or no rollout could ever go on."""
        for one in rollouts:
            if not one.turns:
                raise LorafoldError(f"{one.prompt.where}: the environment never called the model")
        refused = [one for one in rollouts if one.refused]
        self.has_continued = self.has_continued or any(one.turns > 1 for one in rollouts)
        if refused and not self.has_continued:
            raise LorafoldError(f"{refused[0].prompt.where}: {refused[0].refused}")
        if refused and not self.has_warned:
            self.has_warned = True
            log.warning("%s: left out: %s", refused[0].prompt.where, refused[0].refused)


def _sampled(stream: EventStream) -> tuple[tuple[int, ...], list[float], bool]:
    end = stream.result()
    if end.reason == "failed":
        raise LorafoldError(f"sampling a completion failed: {end.message}")
    tokens = [event for event in stream.so_far() if isinstance(event, Token)]
    return end.tokens, [float(one.drawn_logprob or 0.0) for one in tokens], end.reason == "end"
