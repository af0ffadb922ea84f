"""One completion, and all those of one request, as the event loop sees them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from lorafold.serving.backend import LOST, NOT_FINITE, Ended, Request, Sampling, Token
from lorafold.serving.parts import PartReader
from lorafold.serving.refusal import FIELDS, Refusal, wrong
from lorafold.serving.rendering import Chosen, Renderer
from lorafold.serving.settings import Limits
from lorafold.serving.wire.body import Completing

Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Prompted:
    """What the engine is asked for, once it is known under which adapter.

    chosen: What it runs under.
    text: The prompt in words, or all of them, for the log.
    prompts: The tokens of each prompt.
    sampling: The settings of all completions, but for the seed.
    reader: Tells the parts of a completion apart; each has a copy. None for plain text.
    prompt_logprobs: How many of the most likely tokens are listed beside each token of the prompts,
        None for no log probabilities of those.
    """

    chosen: Chosen
    text: object
    prompts: Prompts
    sampling: Sampling
    reader: PartReader | None = None
    prompt_logprobs: int | None = None


class Asked(ABC):
    """Abstract: one request, whatever its dialect.

    Args:
        field: the field with the prompts.
        max_new_tokens: the most tokens of a completion (None: what is left of the length).
    """

    def __init__(self, body: Completing, field: str, max_new_tokens: int | None) -> None:
        self.body, self.field, self.max_new_tokens = body, field, max_new_tokens

    @abstractmethod
    def rendered(self, renderer: Renderer) -> tuple[object, Prompts]:
        """The prompts in words and in tokens. It may take its time. Raises Refusal."""

    @abstractmethod
    def prompted(self, chosen: Chosen) -> Prompted:
        """What the engine is asked for. It may take its time. Raises Refusal."""


class CompletionJob:
    """One completion: what was asked of the backend, and what came back so far. All times are by
    time.monotonic.

    Args:
        adapter: the name of the adapter, or of the base.
        asked: when its request came.
        arrived: set whenever events arrive.
        count: called with the number of tokens that arrive.
    """

    def __init__(
        self,
        request: Request,
        adapter: str,
        asked: float,
        arrived: asyncio.Event,
        count: Callable[[int], None],
    ) -> None:
        self.request, self.adapter, self.asked = request, adapter, asked
        self._arrived, self._count = arrived, count
        self.began: float | None = None  # when it got a slot
        self.admitted = False  # until then its request is one that is thought about
        self.prompt: Sequence[Token] = ()  # with log probabilities, if they were asked for
        self.tokens = 0  # that arrived
        self.events: deque[Token | Ended] = deque()
        self.end: Ended | None = None
        self.why: Refusal | None = None  # the server's reason to end it
        self.before: float | None = None  # when events arrived before the last ones
        self.times: list[float] = []  # of the first token and the last

    def put(self, events: Sequence[Token | Ended]) -> None:
        """Take what arrived."""
        now, new = time.monotonic(), sum(isinstance(event, Token) for event in events)
        self.events.extend(events)
        self.tokens += new
        self._count(new)
        last = events[-1]
        self.end = last if isinstance(last, Ended) else None
        if self.end is not None and self.end.message == LOST:
            self.why = Refusal(503, "engine_restarted", f"{LOST}; try again", retry_after=1)
        self.before = self.times[-1] if self.times else None
        if isinstance(events[0], Token):
            self.times = [*self.times[:1], now]
        self._arrived.set()

    def late(self, now: float, limits: Limits) -> Refusal | None:
        """Why it should end now, if it took longer than it may."""
        waited = now - self.asked
        if self.began is None and waited > limits.queue_seconds:
            told = f"waited {limits.queue_seconds:g} s for a slot"
            return Refusal(503, "queue_timeout", told, retry_after=round(limits.queue_seconds))
        if not self.times and waited > limits.first_token_seconds:
            told = f"no token after {limits.first_token_seconds:g} s"
            return Refusal(504, "first_token_timeout", told)
        if waited > limits.total_seconds:
            return Refusal(504, "total_timeout", f"not complete after {limits.total_seconds:g} s")
        return None

    def unread(self, limits: Limits) -> Refusal | None:
        """Why it should end now, if its client is too far behind."""
        if len(self.events) <= limits.unread_tokens:
            return None
        return Refusal(408, "slow_reader", f"the client left {len(self.events)} tokens unread")

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
            told = f"{self.adapter}: the model's logits are not finite under it"
            return Refusal(500, "adapter_numerics", told, "model")
        if self.began is None:
            told = f"{self.adapter} can't be read now; the server's log says why"
            return Refusal(503, "adapter_unavailable", told, "model")
        return Refusal(500, "not_computed", "the completion failed; the server's log says why")


class Reply:
    """The completions of one request, in the order in which they are answered.

    Args:
        id: the server's name of the request.
    """

    def __init__(self, id: str) -> None:
        self.id, self.created = id, int(time.time())
        self.arrived = asyncio.Event()
        self.prompted: Prompted  # once it is admitted
        self.jobs: list[CompletionJob] = []  # as many for each prompt

    async def events(self) -> AsyncIterator[tuple[int, Token | Ended]]:
        """Every event with the number of its completion. Raises Refusal for one that fails."""
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
    def usage(self) -> dict[str, object]:
        """The tokens of prompts and completions."""
        each = len(self.jobs) // len(self.prompted.prompts)
        prompts = sum(map(len, self.prompted.prompts))
        ends = [job.end for job in self.jobs if job.end]
        new = sum(len(end.tokens) for end in ends)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
            "prompt_tokens_details": {"cached_tokens": sum(e.cached for e in ends[::each])},
        }
