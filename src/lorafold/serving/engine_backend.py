"""Runs lorafold's engine in a thread. After each step, all new events are passed to the event loop
in one call. If the thread dies, all requests end, and a new engine with the same model and adapters
replaces it.
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
from lorafold.serving.backend import CRASHED, AdapterFiles, Backend, Output, Stage, States, running
from lorafold.serving.settings import Settings

log = logging.getLogger(__name__)
CHECK_INTERVAL = 0.25  # seconds between checks of the thread
BACKOFF = (0.0, 1.0, 5.0, 15.0, 60.0)  # seconds before the next restart, by number of failures
STABLE_SECONDS = 60.0  # seconds after which a restart counts as successful


@dataclass
class ActiveRequest:
    id: str
    stream: EventStream | None = None  # None until the engine accepts it
    delivered: int = 0
    began: float | None = None

    def update(self) -> Output | None:
        if self.stream is None:
            return None
        events, began = self.stream.so_far(self.delivered), self.stream.began
        if not events and began == self.began:
            return None
        self.delivered, self.began = self.delivered + len(events), began
        return Output(self.id, events, began, self.stream.prompt)

    def lost_update(self) -> Output:
        events = self.stream.so_far()[: self.delivered] if self.stream else []
        tokens = tuple(event.token for event in events if isinstance(event, Token))
        return Output(self.id, [Ended(self.id, "failed", tokens, message=CRASHED)], self.began)


class EngineBackend(Backend):
    """A backend that calls `restarted` before it restarts the engine."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        restarted: Callable[[], None],
        allow_other_base: bool = False,
    ) -> None:
        tenant_slots = settings.limits.tenant_running
        if tenant_slots is None and settings.keys is not None:
            tenant_slots = max(1, settings.slots * 3 // 4)
        engine_settings = EngineSettings(
            slots=settings.slots, length=settings.length, kv_bytes=settings.kv_bytes,
            budget=settings.prompt_budget, adapter_bytes=settings.adapter_bytes,
            prefix_reuse=settings.prefix_reuse, strikes=settings.strikes, tenant_slots=tenant_slots,
            weights=settings.weights, allow_other_base=allow_other_base,
        )  # fmt: skip
        self._new_engine = partial(Engine, model, tokenizer, engine_settings)
        self.engine, self._restarted = self._new_engine(), restarted
        self._heartbeat_seconds = settings.heartbeat_seconds
        self._lock = threading.Lock()
        self._requests: dict[str, ActiveRequest] = {}
        self._known: dict[str, AdapterFiles] = {}
        self._pinned: set[str] = set()
        self._resident: set[str] = set()
        self._idle_seconds = 0.0  # seconds without a step, not counting pauses of the process
        self._started = time.monotonic()
        self._failures, self._restarting = 0, False

    @property
    def length(self) -> int:
        return self.engine.length

    @property
    def not_ready(self) -> str:
        if self._restarting or not self.engine.alive:
            return "the engine is restarting"
        message = f"the engine has not completed a step for {self._idle_seconds:.0f} s"
        return message if self._idle_seconds > self._heartbeat_seconds else ""

    @asynccontextmanager
    async def events(self, notify: Callable[[Sequence[Output]], None]) -> AsyncIterator[None]:
        self._loop, self._notify = asyncio.get_running_loop(), notify
        self.engine.start(self._collect_updates)
        try:
            async with running(self._watch()):
                yield
        finally:
            await asyncio.to_thread(self.engine.close)

    def submit(self, request: Request) -> None:
        engine, active = self.engine, ActiveRequest(request.id)
        with self._lock:
            self._requests[request.id] = active
        try:
            active.stream = engine.submit(request)
        except BaseException:
            with self._lock:
                self._requests.pop(request.id, None)
            raise
        engine.wake()  # the last step may have preceded the assignment of the stream

    def cancel(self, id: str) -> None:
        self.engine.cancel(id)

    def load(self, adapter: AdapterFiles, until: Stage) -> None:
        key, path, stack = adapter.key, adapter.path, _stack(adapter)
        if until == "checked":
            self.engine.verify(KnownAdapter(key, path, stack, 0))
            return
        with self._lock:
            engine, previous = self.engine, self._known.get(key)
            self._known[key] = adapter
            if until == "known":
                engine.adapters.register(key, path, stack)
                return
        try:
            engine.load(key, path, stack=stack, wait=until == "resident")
        except BaseException:
            if previous is None:
                with self._lock:
                    self._known.pop(key, None)
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
        adapters, structure, kv = self.engine.adapters, self.engine.structure, self.engine.kv_tokens
        return States(
            adapters.statuses(), dict(adapters.seconds), adapters.nbytes, adapters.reads,
            adapters.evictions, adapters.damaged, structure.unbatched_reason, kv,
            kv * structure.token_bytes,
        )  # fmt: skip

    def _collect_updates(self) -> None:
        """The engine's thread calls this after each step."""
        with self._lock:
            updates = [update for active in self._requests.values() if (update := active.update())]
        self._idle_seconds = 0.0
        if updates:
            self._loop.call_soon_threadsafe(self._deliver, updates)

    def _deliver(self, updates: Sequence[Output]) -> None:
        # requests are removed only here, so that undelivered ends are reported as lost
        with self._lock:
            for update in updates:
                if update.events and isinstance(update.events[-1], Ended):
                    self._requests.pop(update.id, None)
        self._notify(updates)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            self._idle_seconds += CHECK_INTERVAL
            if not self.engine.alive:
                await self._restart()
            statuses = self.engine.adapters.statuses().items()
            self._resident = {k for k, (state, _) in statuses if state in ("resident", "loading")}

    async def _restart(self) -> None:
        self._restarting = True
        with self._lock:
            requests, self._requests = self._requests, {}
        self._notify([active.lost_update() for active in requests.values()])
        was_stable = time.monotonic() - self._started > STABLE_SECONDS
        self._failures = 0 if was_stable else min(self._failures + 1, len(BACKOFF) - 1)
        log.error("the engine's thread stopped; %d requests were lost", len(requests))
        self._restarted()
        while True:
            await asyncio.sleep(BACKOFF[self._failures])
            try:
                await self._loop.run_in_executor(None, self._replace_engine)
                break
            except Exception:
                self._failures = min(self._failures + 1, len(BACKOFF) - 1)
                log.exception("the engine can't be restarted")
        self._idle_seconds, self._started = 0.0, time.monotonic()
        self._restarting = False
        log.info("the engine is running again")

    def _replace_engine(self) -> None:
        with suppress(Exception):  # closing restores the model
            self.engine.close()
        engine = self._new_engine()
        with self._lock:
            for key, adapter in self._known.items():
                engine.adapters.register(key, adapter.path, _stack(adapter))
                engine.adapters.pin(key, key in self._pinned)
                if key in self._resident:
                    engine.load(key, adapter.path, stack=_stack(adapter), wait=False)
            self.engine = engine
        engine.start(self._collect_updates)


def _stack(adapter: AdapterFiles) -> tuple[VerifiedAdapter, ...]:
    return tuple(map(VerifiedAdapter, adapter.stack, adapter.sizes))
