"""lorafold's engine as the server's backend: in a thread of this process, and anew if that dies.

After every step the engine's thread hands over what is new, in one call of the event loop for all
requests. A thread that died ends its requests at once; then an engine is opened anew on the same
model, with the adapters that were known, and those read that were in memory.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafold.engine import Ended, Engine, EngineSettings, EventStream, Request, Token
from lorafold.engine.adapters import KnownAdapter, VerifiedAdapter
from lorafold.serving.backend import LOST, AdapterFiles, Backend, News, States, Until, while_open
from lorafold.serving.settings import Settings

log = logging.getLogger(__name__)
WATCH = 0.25  # seconds between two looks at the thread
BACKOFF = (0.0, 1.0, 5.0, 15.0, 60.0)  # seconds before the next start, while none lasts
LASTS = 60.0  # seconds after which a start counts as one that lasts


@dataclass
class ActiveRequest:
    """A request that the engine has, and how much of its news was handed over."""

    stream: EventStream | None = None  # until the engine took it
    passed_on: int = 0
    began: float | None = None

    def news(self, id: str) -> News | None:
        """What is new of it, under the request's name."""
        if self.stream is None:
            return None
        events, began = self.stream.so_far(self.passed_on), self.stream.began
        if not events and began == self.began:
            return None
        self.passed_on, self.began = self.passed_on + len(events), began
        return News(id, events, began, self.stream.prompt)

    def lost(self, id: str) -> News:
        """Its end, with the tokens that were handed over."""
        seen = self.stream.so_far()[: self.passed_on] if self.stream else []
        tokens = tuple(event.token for event in seen if isinstance(event, Token))
        return News(id, [Ended(id, "failed", tokens, message=LOST)], self.began)


class InProcess(Backend):
    """An engine that computes."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        restarted: Callable[[], None],
        allow_other_base: bool = False,
    ) -> None:
        most = settings.limits.tenant_running
        if most is None and settings.keys is not None:
            most = max(1, settings.slots * 3 // 4)
        own = EngineSettings(
            slots=settings.slots, length=settings.length, budget=settings.prompt_budget,
            adapter_bytes=settings.adapter_bytes,
            prefix_reuse=settings.prefix_reuse, strikes=settings.strikes, tenant_slots=most,
            weights=settings.weights, allow_other_base=allow_other_base,
        )  # fmt: skip
        self._open = partial(Engine, model, tokenizer, own)
        self.engine, self._restarted = self._open(), restarted
        self._late = settings.heartbeat_seconds
        self._lock = threading.Lock()
        self._sent: dict[str, ActiveRequest] = {}
        self._known: dict[str, AdapterFiles] = {}
        self._pinned: set[str] = set()
        self._resident: set[str] = set()
        self._silent = 0.0  # seconds without a step, as far as this process ran
        self._started = time.monotonic()
        self._failures, self._restarting = 0, False

    @property
    def length(self) -> int:
        return self.engine.length

    @property
    def ready(self) -> str:
        if self._restarting or not self.engine.alive:
            return "the engine is being started again"
        late = self._silent > self._late
        return f"the engine made no step for {self._silent:.0f} s" if late else ""

    @asynccontextmanager
    async def events(self, take: Callable[[Sequence[News]], None]) -> AsyncIterator[None]:
        self._loop, self._take = asyncio.get_running_loop(), take
        self.engine.start(self._hand_over)
        try:
            async with while_open(self._watch()):
                yield
        finally:
            await asyncio.to_thread(self.engine.close)

    def submit(self, request: Request) -> None:
        engine, sent = self.engine, ActiveRequest()
        with self._lock:
            self._sent[request.id] = sent
        try:
            sent.stream = engine.submit(request)
        except BaseException:
            with self._lock:
                self._sent.pop(request.id, None)
            raise
        engine.wake()  # the thread may have made its last step before it saw the stream

    def cancel(self, id: str) -> None:
        self.engine.cancel(id)

    def load(self, found: AdapterFiles, until: Until) -> None:
        if until == "checked":
            self.engine.verify(KnownAdapter(found.key, found.path, _stack(found), 0))
            return
        with self._lock:
            engine, known = self.engine, self._known.get(found.key)
            self._known[found.key] = found
            if until == "known":
                engine.adapters.know(found.key, found.path, _stack(found))
                return
        try:
            engine.load(found.key, found.path, stack=_stack(found), wait=until == "resident")
        except BaseException:
            if known is None:
                with self._lock:
                    self._known.pop(found.key, None)
            raise

    def unload(self, key: str) -> None:
        with self._lock:
            self._known.pop(key, None)
            self._pinned.discard(key)
            self.engine.unload(key)

    def pin(self, key: str, pinned: bool) -> None:
        with self._lock:
            self.engine.adapters.pin(key, pinned)
            (self._pinned.add if pinned else self._pinned.discard)(key)

    def states(self) -> States:
        adapters = self.engine.adapters
        return States(
            adapters.warm(), dict(adapters.seconds), adapters.nbytes, adapters.reads,
            adapters.evictions, adapters.damaged, self.engine.structure.why,
        )  # fmt: skip

    def _hand_over(self) -> None:
        """Pass on what is new; the engine's thread calls it after every step."""
        with self._lock:
            found = [news for id, sent in self._sent.items() if (news := sent.news(id))]
        self._silent = 0.0
        if found:
            self._loop.call_soon_threadsafe(self._deliver, found)

    def _deliver(self, found: Sequence[News]) -> None:
        # not before: a thread that dies on the way leaves them to be ended
        with self._lock:
            for news in found:
                if news.events and isinstance(news.events[-1], Ended):
                    self._sent.pop(news.id, None)
        self._take(found)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            self._silent += WATCH
            if not self.engine.alive:
                await self._restart()
            warm = self.engine.adapters.warm().items()
            self._resident = {k for k, (state, _) in warm if state in ("resident", "loading")}

    async def _restart(self) -> None:
        """End the requests of a thread that died, and open another engine."""
        self._restarting = True
        with self._lock:
            sent, self._sent = self._sent, {}
        self._take([one.lost(id) for id, one in sent.items()])
        lasted = time.monotonic() - self._started > LASTS
        self._failures = 0 if lasted else min(self._failures + 1, len(BACKOFF) - 1)
        log.error("the engine's thread ended; %d requests are lost", len(sent))
        self._restarted()
        while True:
            await asyncio.sleep(BACKOFF[self._failures])
            try:
                await self._loop.run_in_executor(None, self._reopen)
                break
            except Exception:
                self._failures = min(self._failures + 1, len(BACKOFF) - 1)
                log.exception("the engine can't be opened")
        self._silent, self._started = 0.0, time.monotonic()
        self._restarting = False
        log.info("the engine computes again")

    def _reopen(self) -> None:
        with suppress(Exception):  # whatever the thread left, the model is given back
            self.engine.close()
        engine = self._open()
        with self._lock:
            for key, found in self._known.items():
                engine.adapters.know(key, found.path, _stack(found))
                engine.adapters.pin(key, key in self._pinned)
                if key in self._resident:
                    engine.load(key, found.path, stack=_stack(found), wait=False)
            self.engine = engine
        engine.start(self._hand_over)


def _stack(found: AdapterFiles) -> tuple[VerifiedAdapter, ...]:
    """What is read for an adapter, as the engine has to find it."""
    return tuple(map(VerifiedAdapter, found.stack, found.sizes))
