"""One completion, and all those of one request, as the event loop sees them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from lorafold.engine import Ended, Request, Stream, Token
from lorafold.engine.sampler import NOT_FINITE
from lorafold.serving.refusal import FIELDS, Refusal, wrong
from lorafold.serving.rendering import Chosen
from lorafold.serving.settings import Limits


class Job:
    """One completion: what was asked of the engine, and what came back so far. All times are by
    time.monotonic.

    Args:
        request: what is asked.
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
        self.stream: Stream | None = None  # once the engine has it
        self.admitted = False  # until then its request is one that is thought about
        self.passed_on = 0  # events of the stream that were handed over
        self.events: deque[Token | Ended] = deque()
        self.end: Ended | None = None
        self.why: Refusal | None = None  # the server's reason to end it
        self.before: float | None = None  # when events arrived before the last ones
        self.times: list[float] = []  # of the first token and the last

    @property
    def began(self) -> float | None:
        """When it got a slot."""
        return self.stream.began if self.stream else None

    def put(self, events: Sequence[Token | Ended]) -> None:
        """Take what the engine handed over."""
        now = time.monotonic()
        self.events.extend(events)
        self._count(sum(isinstance(event, Token) for event in events))
        last = events[-1]
        self.end = last if isinstance(last, Ended) else None
        self.before = self.times[-1] if self.times else None
        if isinstance(events[0], Token):
            self.times = [*self.times[:1], now]
        self._arrived.set()

    def lost(self, why: Refusal) -> list[Token | Ended]:
        """End it without the engine, with the tokens that were handed over; returns its end."""
        self.why = why
        seen = self.stream.so_far()[: self.passed_on] if self.stream else []
        tokens = tuple(event.token for event in seen if isinstance(event, Token))
        ended: list[Token | Ended] = [Ended(self.request.id, "failed", tokens)]
        self.put(ended)
        return ended

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
        self.texts, self.jobs = 0, list[Job]()

    def runs(self, chosen: Chosen, texts: int, jobs: list[Job]) -> None:
        """Set what it runs under, and its completions, of which each prompt has as many.

        Args:
            chosen: what it runs under.
            texts: how many prompts there are.
            jobs: the completions.
        """
        self.chosen, self.texts, self.jobs = chosen, texts, jobs

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
        per_text = len(self.jobs) // self.texts
        prompts = sum(len(job.request.prompt) for job in self.jobs[::per_text])
        ends = [job.end for job in self.jobs if job.end]
        new = sum(len(end.tokens) for end in ends)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
            "prompt_tokens_details": {"cached_tokens": sum(e.cached for e in ends[::per_text])},
        }
