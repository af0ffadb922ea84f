"""The completions of a request on the event loop, and the parsing of their text.

`PartReader` withholds text while it may be the start of a tag, and after the start of a tool call,
so streamed text is never retracted. A call that can't be parsed becomes content.
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

from lorafold.data.chat_template import template_of
from lorafold.data.messages import Tool
from lorafold.data.tool_calls import grammar_of, parse_calls, special_tokens
from lorafold.errors import LorafoldError
from lorafold.serving.backend import CRASHED, NOT_FINITE, Ended, Request, Sampling, Token, overlap
from lorafold.serving.refusals import FIELD_BY_SETTING, Refusal, invalid
from lorafold.serving.rendering import Renderer, ServedModel
from lorafold.serving.request_body import Generation
from lorafold.serving.settings import Limits

REASONING, CONTENT = "reasoning_content", "content"
Part = tuple[str, str]  # the field of a message, and text to append
Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Resolved:
    """A request to the engine after its adapter was chosen."""

    chosen: ServedModel
    text: object  # the prompts as text, for the log
    prompts: Prompts
    sampling: Sampling  # for all completions, which have different seeds
    reader: Any = None  # a PartReader that is copied for each completion; None for plain text
    prompt_logprobs: int | None = None  # see `engine.Request`


class DialectRequest(ABC):
    """A completion request in any API. `names` maps lorafold's names of fields to the client's, and
    `field` is the client's field that contains the prompts.
    """

    def __init__(
        self, body: Generation, names: Mapping[str, str], field: str, max_new_tokens: int | None
    ) -> None:
        self.body, self.names, self.field = body, names, field
        self.max_new_tokens = max_new_tokens

    @abstractmethod
    def render_prompts(self, renderer: Renderer) -> tuple[object, Prompts]:
        """Returns the prompts as text and as tokens. Too slow for the event loop."""

    @abstractmethod
    def resolve(self, chosen: ServedModel) -> Resolved:
        """Returns the request for a model. Too slow for the event loop."""


@dataclass(eq=False)
class CompletionJob:
    """One completion of a request. Times are from time.monotonic()."""

    request: Request
    adapter: str  # the adapter's or the base's name
    received_at: float  # arrival of the HTTP request
    arrived: asyncio.Event
    count: Callable[[int], None]  # receives the number of new tokens
    began: float | None = None  # when it got a slot
    admitted: bool = False  # until then, the HTTP request counts as waiting
    prompt: Sequence[Token] = ()  # with logprobs, if requested
    tokens: int = 0
    events: deque[Token | Ended] = field(default_factory=deque)
    end: Ended | None = None
    refusal: Refusal | None = None  # why the server ended it
    previous_time: float | None = None  # arrival of the previous events
    token_times: Sequence[float] = ()  # of the first and the last token

    def add_events(self, events: Sequence[Token | Ended]) -> None:
        now, new = time.monotonic(), sum(isinstance(event, Token) for event in events)
        self.events.extend(events)
        self.tokens += new
        self.count(new)
        last = events[-1]
        self.end = last if isinstance(last, Ended) else None
        if self.end is not None and self.end.message == CRASHED:
            self.refusal = Refusal(503, "engine_restarted", f"{CRASHED}; try again", retry_after=1)
        self.previous_time = self.token_times[-1] if self.token_times else None
        if isinstance(events[0], Token):
            self.token_times = [*self.token_times[:1], now]
        self.arrived.set()

    def timeout(self, now: float, limits: Limits) -> Refusal | None:
        queue, first = limits.queue_seconds, limits.first_token_seconds
        waited = now - self.received_at
        if self.began is None and waited > queue:
            message = f"the completion did not begin within {queue:g} s; try again later"
            return Refusal(503, "queue_timeout", message, retry_after=round(queue))
        if not self.token_times and waited > first:
            return Refusal(504, "first_token_timeout", f"no token was generated in {first:g} s")
        if waited > (most := limits.total_seconds):
            return Refusal(504, "total_timeout", f"the completion took more than {most:g} s")
        return None

    @property
    def failed(self) -> Refusal | None:
        if self.end is None or self.end.reason not in ("failed", "cancelled"):
            return None
        if self.refusal is not None:
            return self.refusal
        if self.end.setting:
            field = FIELD_BY_SETTING.get(self.end.setting, self.end.setting)
            return invalid(field, self.end.message.partition(": ")[2])
        if self.end.message == NOT_FINITE:
            message = f"{self.adapter}: the model's logits are NaN or infinite"
            return Refusal(500, "adapter_numerics", message, "model")
        if self.began is None:
            message = f"{self.adapter} can't be used; see the server's log"
            return Refusal(503, "adapter_unavailable", message, "model")
        return Refusal(500, "not_computed", "the completion failed; see the server's log")


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int
    cached: int

    @property
    def openai(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Reply:
    def __init__(self, id: str) -> None:
        self.id, self.created = id, int(time.time())
        self.arrived = asyncio.Event()
        self.resolved: Resolved  # set on admission
        self.jobs: list[CompletionJob] = []  # the same number for each prompt

    async def events(self) -> AsyncIterator[tuple[int, Token | Ended]]:
        unfinished = len(self.jobs)
        while unfinished:
            await self.arrived.wait()
            self.arrived.clear()
            for i, job in enumerate(self.jobs):
                while job.events:
                    event = job.events.popleft()
                    if isinstance(event, Ended):
                        unfinished -= 1
                        if job.failed is not None:
                            raise job.failed
                    yield i, event

    @property
    def usage(self) -> Usage:
        ends = [job.end for job in self.jobs if job.end]
        return Usage(
            sum(map(len, self.resolved.prompts)),
            sum(len(end.tokens) for end in ends),
            sum(end.cached for end in ends[::len(self.jobs) // len(self.resolved.prompts)]),
        )


class PartReader:
    """Splits a completion into reasoning, content and calls by the tags of the chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, tools: Sequence[Tool]
    ) -> None:
        self._tokenizer, self._tools, self._buffer = tokenizer, tools, ""
        self.length = 0  # characters so far
        block = template_of(tokenizer).block
        self._opening, self._closing = block.opening, block.closing
        opened = prompt.rstrip().endswith(block.opening)
        self._state = "thinking" if opened else "start" if block.shown else "saying"
        grammar = grammar_of(tokenizer) if tools else None
        words = special_tokens(tokenizer)
        self._call_tag = grammar.without(words).before.strip() if grammar else ""
        # calls have no tag, so any text may be a call
        self._untagged_calls = bool(grammar) and not self._call_tag

    @property
    def field(self) -> str:
        """The field of the message for new text, or "" for calls."""
        if self._state == "calling":
            return ""
        return REASONING if self._state == "thinking" else CONTENT

    def add(self, piece: str) -> list[Part]:
        self._buffer += piece
        self.length += len(piece)
        parts = []
        if self._state == "start":
            text = self._buffer.lstrip()
            if text.startswith(self._opening):
                self._state, self._buffer = "thinking", text[len(self._opening) :].lstrip()
            elif text and not self._opening.startswith(text):
                self._state = "saying"
        if self._state == "thinking":
            before, mark, after = self._buffer.partition(self._closing)
            if mark:
                parts.append((REASONING, before.rstrip()))
                self._state, self._buffer = "saying", after.lstrip()
            else:
                parts.append((REASONING, self._release(self._closing)))
        if self._state == "saying" and not self._untagged_calls:
            at = self._buffer.find(self._call_tag) if self._call_tag else -1
            if at >= 0:
                parts.append((CONTENT, self._buffer[:at].rstrip()))
                self._state, self._buffer = "calling", self._buffer[at:]
            else:
                parts.append((CONTENT, self._release(self._call_tag)))
        return [part for part in parts if part[1]]

    def finish(self) -> tuple[list[Part], list[dict[str, Any]]]:
        """Returns the remaining parts, and the calls in the form of `parse_calls`."""
        calls = []
        if self._state == "calling" or self._untagged_calls:
            with suppress(LorafoldError, RecursionError, MemoryError):  # endless nesting
                calls = parse_calls(self._buffer, self._tokenizer, self._tools)
        if calls or not self._buffer:
            return [], calls
        return [(REASONING if self._state == "thinking" else CONTENT, self._buffer)], []

    def _release(self, mark: str) -> str:
        """Releases the text before a possible start of the tag and its leading whitespace."""
        text = self._buffer
        taken = text[: len(text) - overlap(text, [mark])].rstrip() if mark else text
        self._buffer = text[len(taken) :]
        return taken
