"""The engine's thread, and what passes between it and the event loop.

    host = Host(open_engine, registry, settings)
    await host.start()
    await host.submit(job)          its events come to the job, at most a step later
    host.cancel(job, why)

After every step the engine's thread hands over what is new, in one call of the event loop for all
requests. A thread that died ends its requests at once; then an engine is opened anew on the same
model, with the adapters that were in memory.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from lorafold.engine import Ended, Engine, Token
from lorafold.engine.sampler import NOT_FINITE
from lorafold.errors import LorafoldError
from lorafold.machine.threads import alone
from lorafold.serving.job import Job
from lorafold.serving.metrics import Metrics
from lorafold.serving.refusal import Refusal
from lorafold.serving.registry import Registry
from lorafold.serving.settings import Settings

T = TypeVar("T")
log = logging.getLogger(__name__)
THREADS, TURNS = 4, 2  # that think, and of them one tenant's
WATCH = 0.25  # seconds between two looks at deadlines and the thread
BACKOFF = (0.0, 1.0, 5.0, 15.0, 60.0)  # seconds before the next start, while none lasts
LASTS = 60.0  # seconds after which a start counts as one that lasts


class Host:
    """Keeps an engine that computes.

    Args:
        engine: an engine, open and not started.
        reopen: opens another one on the same model.
        registry: told of every new engine.
        settings: the limits.
        metrics: what is counted.
    """

    def __init__(
        self,
        engine: Engine,
        reopen: Callable[[], Engine],
        registry: Registry,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.engine, self._reopen, self._registry = engine, reopen, registry
        self.settings, self.metrics = settings, metrics
        self.jobs: dict[str, Job] = {}
        self.draining = False
        self.pool = ThreadPoolExecutor(THREADS, "lorafold-requests", initializer=alone)
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._silent = 0.0  # seconds without a step, as far as this process ran
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._thinking: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=64)
        self._failures = 0
        self._restarting = False

    async def start(self) -> None:
        """Begin to compute, and to watch."""
        self._loop = asyncio.get_running_loop()
        self.engine.start(self._hand_over)
        self._registry.begin()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End all requests and the thread."""
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
        await asyncio.to_thread(self._registry.close)
        await asyncio.to_thread(self.engine.close)
        self.pool.shutdown()

    @property
    def ready(self) -> str:
        """Why requests can't be computed now, empty if they can."""
        if self.draining:
            return "the server is about to end"
        if self._restarting or not self.engine.alive:
            return "the engine is being started again"
        late = self._silent > self.settings.heartbeat_seconds
        return f"the engine made no step for {self._silent:.0f} s" if late else ""

    def submit(self, job: Job) -> None:
        """Give a job to the engine, which may take its time. Raises LorafoldError if it is refused.
        """
        with self._lock:
            self.jobs[job.request.id] = job
        engine = self.engine
        try:
            job.stream = engine.submit(job.request)
        except BaseException:
            with self._lock:
                self.jobs.pop(job.request.id, None)
            raise
        engine.wake()  # the thread may have made its last step before it saw the stream

    async def think(self, do: Callable[[], T], tenant: str) -> T:
        """What a function gives that takes its time, computed beside the event loop; of a tenant
        TURNS at a time, so that none waits for more than as many of each other's.

        Args:
            do: the function.
            tenant: the tenant.
        """
        turn = self._turns.setdefault(tenant, asyncio.Semaphore(TURNS))
        self._thinking[tenant] += 1
        try:
            async with turn:
                doing = self._loop.run_in_executor(self.pool, do)
                try:
                    return await asyncio.shield(doing)
                except asyncio.CancelledError:  # its turn lasts for as long as its thread does
                    await asyncio.wait({doing})
                    raise
        finally:
            self._thinking[tenant] -= 1

    @property
    def seconds_to_wait(self) -> int:
        """About how long what waits now will wait, from how fast requests ended lately."""
        if len(self._ends) < 2:
            return 1
        each = (time.monotonic() - self._ends[0]) / len(self._ends)
        return max(1, min(60, round(each * self.waiting())))

    def cancel(self, job: Job, why: Refusal | None = None) -> None:
        """End a job within a step."""
        if job.end is None:
            job.why = job.why or why
        self.engine.cancel(job.request.id)

    def waiting(self, tenant: str | None = None) -> int:
        """How many requests are thought about, and how many jobs wait for a slot and have no reason
        to end: those of one tenant or all.
        """
        jobs = list(self.jobs.values())
        waiting = [j for j in jobs if j.admitted and not (j.began or j.why)]
        thinking = self._thinking.total() if tenant is None else self._thinking[tenant]
        return thinking + sum(tenant in (None, job.request.tenant) for job in waiting)

    def leaving(self, tenant: str) -> int:
        """How many jobs of a tenant the engine is about to end."""
        return sum(j.request.tenant == tenant for j in list(self.jobs.values()) if j.why)

    def running(self) -> int:
        """How many jobs have a slot."""
        return sum(job.began is not None for job in list(self.jobs.values()))

    def _hand_over(self) -> None:
        """Pass on what is new; the engine's thread calls it after every step."""
        found: list[tuple[Job, list[Token | Ended]]] = []
        with self._lock:
            for job in list(self.jobs.values()):
                if job.stream is None or not (new := job.stream.so_far(job.passed_on)):
                    continue
                job.passed_on += len(new)
                found.append((job, new))
        self._silent = 0.0
        if found:
            self._loop.call_soon_threadsafe(self._deliver, found)

    def _deliver(self, found: list[tuple[Job, list[Token | Ended]]]) -> None:
        for job, events in found:
            if job.end is not None:  # its thread died meanwhile
                continue
            job.put(events)
            self.metrics.arrived(job, events)
            if (why := job.unread(self.settings.limits)) is not None:
                self.cancel(job, why)
            if job.end is not None:
                # not before: a thread that dies on the way leaves it to be ended
                with self._lock:
                    self.jobs.pop(job.request.id, None)
                self._ends.append(time.monotonic())
                texts, end = self.settings.log_texts, job.end
                told = " ".join(end.message.split()) if texts else end.fault
                if told:  # it may name paths, which clients do not get to see
                    log.error("%s failed: %s", job.request.id, told)
                if job.end.message == NOT_FINITE:
                    self.pool.submit(self._suspect, job)

    def _suspect(self, job: Job) -> None:
        """Note it if the engine refuses an adapter from now on."""
        key = job.request.adapter
        with suppress(LorafoldError, Refusal):
            if key and self.engine.adapters.status(key) == "quarantined":
                why = f"{self.settings.strikes} of its requests had logits that are not finite"
                self.metrics.quarantines.inc()
                log.error("%s is in quarantine: %s", key, why)
                self._registry.quarantine(job.adapter, why)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            self._silent += WATCH
            if not self.engine.alive:
                await self._restart()
            self._registry.remember()
            now = time.monotonic()
            for job in list(self.jobs.values()):
                if job.why is None and (why := job.late(now, self.settings.limits)) is not None:
                    self.cancel(job, why)

    async def _restart(self) -> None:
        """End the requests of a thread that died, and open another engine."""
        self._restarting = True
        lost = Refusal(503, "engine_restarted", "the engine stopped; try again", retry_after=1)
        with self._lock:
            jobs, self.jobs = list(self.jobs.values()), {}
        for job in jobs:
            self.metrics.arrived(job, job.lost(lost))
        lasted = time.monotonic() - self._started > LASTS
        self._failures = 0 if lasted else min(self._failures + 1, len(BACKOFF) - 1)
        log.error("the engine's thread ended; %d requests are lost", len(jobs))
        self.metrics.restarts.inc()
        while True:
            await asyncio.sleep(BACKOFF[self._failures])
            try:
                self.engine = await self._loop.run_in_executor(None, self._open)
                break
            except Exception:
                self._failures = min(self._failures + 1, len(BACKOFF) - 1)
                log.exception("the engine can't be opened")
        self._silent, self._started = 0.0, time.monotonic()
        self._restarting = False
        log.info("the engine computes again")

    def _open(self) -> Engine:
        with suppress(Exception):  # whatever the thread left, the model is given back
            self.engine.close()
        engine = self._reopen()
        self._registry.reopen(engine)
        engine.start(self._hand_over)
        return engine
