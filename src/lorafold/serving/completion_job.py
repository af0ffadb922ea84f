"""One completion, and all those of one request, as the event loop sees them.

    reader = PartReader(tokenizer, prompt, tools)   separates reasoning, content and calls
    reader.add("Let me see. <tool_")                [("content", "Let me see.")]
    reader.finish()                                 the rest, and the calls

Text is held back while it may be the beginning of a mark, and from the first call on, so that
nothing is ever taken back. A call that can't be parsed is content.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafold.data.calls import grammar_of, parse_calls, special_words
from lorafold.data.messages import Tool
from lorafold.data.templates import template_of
from lorafold.errors import LorafoldError
from lorafold.serving.backend import LOST, NOT_FINITE, Ended, Request, Sampling, Token, may_begin
from lorafold.serving.errors import FIELDS, Refusal, wrong
from lorafold.serving.rendering import Renderer, ServedModel
from lorafold.serving.request_body import Completing
from lorafold.serving.settings import Limits

REASONING, CONTENT = "reasoning_content", "content"
Part = tuple[str, str]  # the field of a message, and what is added to it
Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Prompted:
    """A request to the engine, once its adapter is chosen."""

    chosen: ServedModel
    text: object  # the prompts in words, for the log
    prompts: Prompts
    sampling: Sampling  # of all completions, but for the seed
    reader: Any = None  # a PartReader, of which each completion has a copy; None for plain text
    prompt_logprobs: int | None = None  # as `engine.Request` has it


class DialectRequest(ABC):
    """Abstract: one request, whatever its dialect. `names` has the client's names of fields by
    ours, `field` the field with the prompts.
    """

    def __init__(
        self, body: Completing, names: Mapping[str, str], field: str, max_new_tokens: int | None
    ) -> None:
        self.body, self.names, self.field = body, names, field
        self.max_new_tokens = max_new_tokens

    @abstractmethod
    def rendered(self, renderer: Renderer) -> tuple[object, Prompts]:
        """The prompts in words and in tokens. It may take its time."""

    @abstractmethod
    def prompted(self, chosen: ServedModel) -> Prompted:
        """The request under a model. It may take its time."""


@dataclass(eq=False)
class CompletionJob:
    """One completion: its request and its events so far. All times are time.monotonic's."""

    request: Request
    adapter: str  # or the base
    submitted: float  # when its request came
    arrived: asyncio.Event
    count: Callable[[int], None]  # called with the number of tokens that arrive
    began: float | None = None  # when it got a slot
    admitted: bool = False  # until then its request counts as waiting
    prompt: Sequence[Token] = ()  # with log probabilities, if the client wants them
    tokens: int = 0  # that arrived
    events: deque[Token | Ended] = field(default_factory=deque)
    end: Ended | None = None
    why: Refusal | None = None  # the server's reason to end it
    before: float | None = None  # when the previous events arrived
    times: Sequence[float] = ()  # of the first token and the last

    def put(self, events: Sequence[Token | Ended]) -> None:
        """Take events that arrived."""
        now, new = time.monotonic(), sum(isinstance(event, Token) for event in events)
        self.events.extend(events)
        self.tokens += new
        self.count(new)
        last = events[-1]
        self.end = last if isinstance(last, Ended) else None
        if self.end is not None and self.end.message == LOST:
            self.why = Refusal(503, "engine_restarted", f"{LOST}; try again", retry_after=1)
        self.before = self.times[-1] if self.times else None
        if isinstance(events[0], Token):
            self.times = [*self.times[:1], now]
        self.arrived.set()

    def late(self, now: float, limits: Limits) -> Refusal | None:
        """The deadline that it exceeds, if any."""
        queue, first = limits.queue_seconds, limits.first_token_seconds
        waited = now - self.submitted
        if self.began is None and waited > queue:
            message = f"waited {queue:g} s for a slot"
            return Refusal(503, "queue_timeout", message, retry_after=round(queue))
        if not self.times and waited > first:
            return Refusal(504, "first_token_timeout", f"no token after {first:g} s")
        if waited > limits.total_seconds:
            return Refusal(504, "total_timeout", f"not complete after {limits.total_seconds:g} s")
        return None

    @property
    def failed(self) -> Refusal | None:
        """Why it has no completion, if it ended without."""
        if self.end is None or self.end.reason not in ("failed", "cancelled"):
            return None
        if self.why is not None:
            return self.why
        if self.end.setting:
            field = FIELDS.get(self.end.setting, self.end.setting)
            return wrong(field, self.end.message.partition(": ")[2])
        if self.end.message == NOT_FINITE:
            message = f"{self.adapter}: the model's logits are not finite under it"
            return Refusal(500, "adapter_numerics", message, "model")
        if self.began is None:
            message = f"{self.adapter} can't be read now; see the server's log"
            return Refusal(503, "adapter_unavailable", message, "model")
        return Refusal(500, "not_computed", "the completion failed; see the server's log")


@dataclass(frozen=True)
class Usage:
    """The tokens of a request."""

    prompt: int
    completion: int
    cached: int  # of the prompt

    @property
    def openai(self) -> dict[str, object]:
        """The usage in the form of completions."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Reply:
    """The completions of one request, in the order in which they are answered."""

    def __init__(self, id: str) -> None:
        self.id, self.created = id, int(time.time())
        self.arrived = asyncio.Event()
        self.prompted: Prompted  # once it is admitted
        self.jobs: list[CompletionJob] = []  # as many for each prompt

    async def events(self) -> AsyncIterator[tuple[int, Token | Ended]]:
        """Every event with the number of its completion."""
        left = len(self.jobs)
        while left:
            await self.arrived.wait()
            self.arrived.clear()
            for i, job in enumerate(self.jobs):
                while job.events:
                    event = job.events.popleft()
                    if isinstance(event, Ended):
                        left -= 1
                        if job.failed is not None:
                            raise job.failed
                    yield i, event

    @property
    def usage(self) -> Usage:
        """The tokens of prompts and completions so far."""
        each = len(self.jobs) // len(self.prompted.prompts)
        ends = [job.end for job in self.jobs if job.end]
        return Usage(
            sum(map(len, self.prompted.prompts)),
            sum(len(end.tokens) for end in ends),
            sum(end.cached for end in ends[::each]),
        )


class PartReader:
    """Separates the parts of one completion by the marks of the tokenizer's chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, tools: Sequence[Tool]
    ) -> None:
        self._tokenizer, self._tools, self._held = tokenizer, tools, ""
        self.length = 0  # of the text so far
        block = template_of(tokenizer).block
        self._opening, self._closing = block.opening, block.closing
        opened = prompt.rstrip().endswith(block.opening)
        self._state = "thinking" if opened else "start" if block.shown else "saying"
        grammar = grammar_of(tokenizer) if tools else None
        words = special_words(tokenizer)
        self._call = grammar.without(words).before.strip() if grammar else ""
        self._all = bool(grammar) and not self._call  # calls have no mark: all may be one

    @property
    def field(self) -> str:
        """The field of the message that the text belongs to now, empty for calls."""
        if self._state == "calling":
            return ""
        return REASONING if self._state == "thinking" else CONTENT

    def add(self, piece: str) -> list[Part]:
        """The parts that a piece of text completes."""
        self._held += piece
        self.length += len(piece)
        parts = []
        if self._state == "start":
            text = self._held.lstrip()
            if text.startswith(self._opening):
                self._state, self._held = "thinking", text[len(self._opening) :].lstrip()
            elif text and not self._opening.startswith(text):
                self._state = "saying"
        if self._state == "thinking":
            before, mark, after = self._held.partition(self._closing)
            if mark:
                parts.append((REASONING, before.rstrip()))
                self._state, self._held = "saying", after.lstrip()
            else:
                parts.append((REASONING, self._take(self._closing)))
        if self._state == "saying" and not self._all:
            at = self._held.find(self._call) if self._call else -1
            if at >= 0:
                parts.append((CONTENT, self._held[:at].rstrip()))
                self._state, self._held = "calling", self._held[at:]
            else:
                parts.append((CONTENT, self._take(self._call)))
        return [part for part in parts if part[1]]

    def finish(self) -> tuple[list[Part], list[dict[str, Any]]]:
        """The parts that are left, and the calls, in OpenAI's form with arguments as objects."""
        calls = []
        if self._state == "calling" or self._all:
            with suppress(LorafoldError, RecursionError, MemoryError):  # nested without end
                calls = parse_calls(self._held, self._tokenizer, self._tools)
        if calls or not self._held:
            return [], calls
        return [(REASONING if self._state == "thinking" else CONTENT, self._held)], []

    def _take(self, mark: str) -> str:
        """The text before what may be the beginning of a mark, and before whitespace there."""
        text = self._held
        taken = text[: len(text) - may_begin(text, [mark])].rstrip() if mark else text
        self._held = text[len(taken) :]
        return taken
