"""What is computed, as the event loop has it: the jobs, their deadlines, and the threads beside it.

    async with host.computing():
        found = await host.think(do, tenant)    what takes its time, beside the event loop
        host.submit(job)                        its events come to the job, at most a step later
        host.cancel(job, why)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

from lorafold.errors import LorafoldError, passes, place
from lorafold.machine.cores import alone, stacks
from lorafold.serving.backend import NOT_FINITE, Backend, Ended, News
from lorafold.serving.job import CompletionJob
from lorafold.serving.metrics import Metrics
from lorafold.serving.refusal import Refusal
from lorafold.serving.registry import Registry
from lorafold.serving.settings import Settings

T = TypeVar("T")
log = logging.getLogger(__name__)
THREADS, TURNS = 4, 2  # that think, and of them one tenant's
WATCH = 0.25  # seconds between two looks at deadlines


class Host:
    """Keeps what is computed."""

    def __init__(
        self, backend: Backend, registry: Registry, settings: Settings, metrics: Metrics
    ) -> None:
        self.backend, self._registry = backend, registry
        self.settings, self.metrics = settings, metrics
        self.jobs: dict[str, CompletionJob] = {}
        self.draining = False
        self.pool = ThreadPoolExecutor(THREADS, "lorafold-requests", initializer=alone)
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._thinking: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=64)

    @asynccontextmanager
    async def computing(self) -> AsyncIterator[None]:
        """Compute and watch; at the end all requests end."""
        self._loop = asyncio.get_running_loop()
        with stacks(), self.pool:
            async with self.backend.events(self._deliver):
                self._registry.begin()
                watching = asyncio.create_task(self._watch())
                try:
                    yield
                finally:
                    watching.cancel()
                    with suppress(asyncio.CancelledError):
                        await watching
                    await asyncio.to_thread(self._registry.close)

    @property
    def ready(self) -> str:
        """Why requests can't be computed now, empty if they can."""
        return "the server is about to end" if self.draining else self.backend.ready

    def submit(self, job: CompletionJob) -> None:
        """Give a job to the backend, which may take its time. Raises LorafoldError if it is
        refused.
        """
        self.jobs[job.request.id] = job
        try:
            self.backend.submit(job.request)
        except BaseException:
            self.jobs.pop(job.request.id, None)
            raise

    async def think(self, do: Callable[[], T], tenant: str) -> T:
        """What a function gives that takes its time, computed beside the event loop; of a tenant
        TURNS at a time, so that none waits for more than as many of each other's. Raises Refusal
        where the machine lacks what it needs for now.
        """
        turn = self._turns.setdefault(tenant, asyncio.Semaphore(TURNS))
        with self.counted(tenant):
            async with turn:
                doing = self._loop.run_in_executor(self.pool, do)
                try:
                    return await asyncio.shield(doing)
                except asyncio.CancelledError:  # its turn lasts for as long as its thread does
                    await asyncio.wait({doing})
                    raise
                except Exception as error:
                    if not passes(error):
                        raise
                    log.warning("a request is refused, the machine is busy: %s", place(error))
                    told = "the server is busy"
                    raise Refusal(503, "machine_busy", told, retry_after=5) from None

    @contextmanager
    def counted(self, tenant: str) -> Iterator[None]:
        """Count a tenant's request among those that wait, as long as the block runs."""
        self._thinking[tenant] += 1
        try:
            yield
        finally:
            self._thinking[tenant] -= 1

    @property
    def seconds_to_wait(self) -> int:
        """About how long what waits now will wait, from how fast requests ended lately."""
        if len(self._ends) < 2:
            return 1
        each = (time.monotonic() - self._ends[0]) / len(self._ends)
        return max(1, min(60, round(each * self.waiting())))

    def cancel(self, job: CompletionJob, why: Refusal | None = None) -> None:
        """End a job within a step."""
        if job.end is None:
            job.why = job.why or why
        self.backend.cancel(job.request.id)

    def waiting(self, tenant: str | None = None) -> int:
        """How many requests are thought about, and how many jobs wait for a slot and have no reason
        to end: those of one tenant or all.
        """
        jobs = list(self.jobs.values())
        waiting = [j for j in jobs if j.admitted and not (j.began or j.why)]
        thinking = self._thinking.total() if tenant is None else self._thinking[tenant]
        return thinking + sum(tenant in (None, job.request.tenant) for job in waiting)

    def leaving(self, tenant: str) -> int:
        """How many jobs of a tenant are about to end."""
        return sum(j.request.tenant == tenant for j in list(self.jobs.values()) if j.why)

    def running(self) -> int:
        """How many jobs have a slot."""
        return sum(job.began is not None for job in list(self.jobs.values()))

    def _deliver(self, found: Sequence[News]) -> None:
        """Pass on what is new."""
        for news in found:
            job = self.jobs.get(news.id)
            if job is None:  # it ended meanwhile
                continue
            job.began = news.began
            if not news.events:
                continue
            job.prompt = news.prompt or job.prompt
            job.put(news.events)
            self.metrics.arrived(job, news.events)
            if (why := job.unread(self.settings.limits)) is not None:
                self.cancel(job, why)
            if job.end is not None:
                self._ended(job, job.end)

    def _ended(self, job: CompletionJob, end: Ended) -> None:
        del self.jobs[job.request.id]
        self._ends.append(time.monotonic())
        told = " ".join(end.message.split()) if self.settings.log_texts else end.fault
        if told:  # it may name paths, which clients do not get to see
            log.error("%s failed: %s", job.request.id, told)
        if end.message == NOT_FINITE:
            self.pool.submit(self._suspect, job)

    def _suspect(self, job: CompletionJob) -> None:
        """Note it if the backend refuses an adapter from now on."""
        key = job.request.adapter
        with suppress(LorafoldError, Refusal):
            if key and self.backend.states().refuses(key):
                why = f"{self.settings.strikes} of its requests had logits that are not finite"
                self.metrics.quarantines.inc()
                log.error("%s is in quarantine: %s", key, why)
                self._registry.quarantine(job.adapter, why)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            now = time.monotonic()
            for job in list(self.jobs.values()):
                if job.why is None and (why := job.late(now, self.settings.limits)) is not None:
                    self.cancel(job, why)
