"""Admission, queue and time limits of completions on the event loop.

Verification, tokenization and grammar compilation run in threads (`Host.in_thread`), so they block
neither the engine nor the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from lorafold.errors import LorafoldError, error_location, is_transient
from lorafold.runtime.processor import stack_size, use_one_thread
from lorafold.serving.backend import NOT_FINITE, Backend, Ended, Output, Request, guidance, running
from lorafold.serving.completion_job import CompletionJob, DialectRequest, Reply, Resolved
from lorafold.serving.keys import Caller, TokenUsage
from lorafold.serving.metrics import Metrics
from lorafold.serving.refusals import FIELD_BY_SETTING, Refusal, check_count, invalid
from lorafold.serving.registry import Registry
from lorafold.serving.rendering import ServedModel
from lorafold.serving.request_body import Generation
from lorafold.serving.settings import Settings
from lorafold.verification.checks import Sandbox

T = TypeVar("T")
log = logging.getLogger(__name__)
THREADS, THREADS_PER_TENANT = 4, 2  # threads for `in_thread`, in total and per tenant
CANCELLED_RATIO = 4  # limit of cancelled completions relative to the limit of waiting ones
MAX_TRIES = 3  # a version may be replaced after it was chosen
CHECK_INTERVAL = 0.25  # seconds between checks of time limits


class Host:
    def __init__(
        self, backend: Backend, registry: Registry, settings: Settings, metrics: Metrics
    ) -> None:
        self.backend, self._registry = backend, registry
        self.settings, self.metrics = settings, metrics
        self.jobs: dict[str, CompletionJob] = {}
        self.draining = False
        self.pool = ThreadPoolExecutor(THREADS, "lorafold-requests", initializer=use_one_thread)
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        self._in_admission: Counter[str] = Counter()
        self._end_times: deque[float] = deque(maxlen=64)

    @asynccontextmanager
    async def computing(self) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        with stack_size(), self.pool:
            async with self.backend.events(self._deliver):
                self._registry.watcher.begin()
                try:
                    async with running(self._watch()):
                        yield
                finally:
                    await asyncio.to_thread(self._registry.close)

    @property
    def not_ready(self) -> str:
        """Why requests can't be computed, or ""."""
        return "the server is shutting down" if self.draining else self.backend.not_ready

    def submit(self, job: CompletionJob) -> None:
        """Submits a completion to the backend. May block."""
        self.jobs[job.request.id] = job
        try:
            self.backend.submit(job.request)
        except BaseException:
            self.jobs.pop(job.request.id, None)
            raise

    async def in_thread(self, function: Callable[[], T], tenant: str) -> T:
        """Runs a slow function in a thread, at most THREADS_PER_TENANT at once per tenant."""
        with self.count_in_admission(tenant):
            async with self._semaphores.setdefault(tenant, asyncio.Semaphore(THREADS_PER_TENANT)):
                future = self._loop.run_in_executor(self.pool, function)
                try:
                    return await asyncio.shield(future)
                except asyncio.CancelledError:  # the tenant's turn ends only with the thread
                    await asyncio.wait({future})
                    raise
                except Exception as error:
                    if not is_transient(error):
                        raise
                    location = error_location(error)
                    log.warning("rejected a request, the machine is busy: %s", location)
                    message = "the server is busy; try again later"
                    raise Refusal(503, "machine_busy", message, retry_after=5) from None

    @contextmanager
    def count_in_admission(self, tenant: str) -> Iterator[None]:
        self._in_admission[tenant] += 1
        try:
            yield
        finally:
            self._in_admission[tenant] -= 1

    @property
    def seconds_to_wait(self) -> int:
        if len(self._end_times) < 2:
            return 1
        each = (time.monotonic() - self._end_times[0]) / len(self._end_times)
        return max(1, min(60, round(each * self.waiting())))

    def cancel(self, job: CompletionJob, why: Refusal | None = None) -> None:
        if job.end is None:
            job.refusal = job.refusal or why
        self.backend.cancel(job.request.id)

    def waiting(self, tenant: str | None = None) -> int:
        """Counts requests in admission and completions that wait for a slot, of one tenant or of
        all.
        """
        thinking = self._in_admission.total() if tenant is None else self._in_admission[tenant]
        return thinking + sum(
            job.admitted and not (job.began or job.refusal) and tenant in (None, job.request.tenant)
            for job in list(self.jobs.values())
        )

    def cancelled(self, tenant: str) -> int:
        return sum(j.request.tenant == tenant for j in list(self.jobs.values()) if j.refusal)

    def running(self) -> int:
        return sum(job.began is not None for job in list(self.jobs.values()))

    def _deliver(self, updates: Sequence[Output]) -> None:
        for update in updates:
            job = self.jobs.get(update.id)
            if job is None:  # the completion has ended
                continue
            job.began = update.began
            if not update.events:
                continue
            job.prompt = update.prompt or job.prompt
            job.add_events(update.events)
            self.metrics.observe_events(job, update.events)
            if (n := len(job.events)) > self.settings.limits.unread_tokens:
                message = f"the client reads too slowly: {n} tokens are unread"
                self.cancel(job, Refusal(408, "slow_reader", message))
            if job.end is not None:
                self._on_end(job, job.end)

    def _on_end(self, job: CompletionJob, end: Ended) -> None:
        del self.jobs[job.request.id]
        self._end_times.append(time.monotonic())
        message = " ".join(end.message.split()) if self.settings.log_texts else end.fault
        if message:  # the client doesn't receive it, because it may contain paths
            log.error("%s failed: %s", job.request.id, message)
        if end.message == NOT_FINITE:
            self.pool.submit(self._check_quarantine, job)

    def _check_quarantine(self, job: CompletionJob) -> None:
        key = job.request.adapter
        with suppress(LorafoldError, Refusal):
            if key and self.backend.states().is_quarantined(key):
                why = f"{self.settings.strikes} requests for it had NaN or infinite logits"
                self.metrics.quarantines.inc()
                log.error("%s was put in quarantine: %s", key, why)
                self._registry.quarantine(job.adapter, why)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            now = time.monotonic()
            for job in list(self.jobs.values()):
                if job.refusal is None and (why := job.timeout(now, self.settings.limits)):
                    self.cancel(job, why)


class Admission:
    def __init__(self, host: Host, registry: Registry, usage: TokenUsage, sandbox: Sandbox) -> None:
        self.host, self.registry, self.usage, self._sandbox = host, registry, usage, sandbox
        self.limits = host.settings.limits

    def check(self, body: Generation) -> None:
        if not 1 <= body.n <= self.limits.choices:
            raise invalid("n", f"found {body.n}, expected 1 to {self.limits.choices}")
        check_count("stop", len(body.stops), self.limits.stops)
        check_count("logit_bias", len(body.logit_bias), self.limits.biases)

    async def admit(
        self, caller: Caller, id: str, received_at: float, request: DialectRequest
    ) -> Reply:
        """Submits all completions of a request, or none. `received_at` is the request's arrival."""
        self.check_caller(caller, request.body.n)
        reply = Reply(id)
        submit = partial(self._submit, caller, received_at, request, reply)
        try:
            reply.resolved = await self.host.in_thread(submit, caller.tenant)
        except BaseException:
            self.cancel_unfinished(reply)
            raise
        for job in reply.jobs:
            job.admitted = True
        self.usage.add(caller.tenant, sum(map(len, reply.resolved.prompts)))
        return reply

    def _submit(
        self, caller: Caller, received_at: float, request: DialectRequest, reply: Reply
    ) -> Resolved:
        """Runs in a thread, because choosing the model and rendering the prompts are slow."""
        count, max_choices = partial(self.usage.add, caller.tenant), self.limits.choices
        for _ in range(MAX_TRIES):
            chosen = self.registry.choose(caller, request.body.model)
            resolved = request.resolve(chosen)
            n = request.body.n * len(resolved.prompts)
            if n > max_choices:
                found = f"found {len(resolved.prompts)} prompts and n = {request.body.n}"
                expected = f"expected at most {max_choices} completions"
                raise invalid(request.field, f"{found}, {expected}")
            self.check_queue(caller.tenant, n - 1)  # `in_thread` already counts one request
            if grammar := resolved.sampling.grammar:
                try:
                    self.check_grammar(grammar)
                except LorafoldError as error:
                    refusal = invalid(grammar[0], f"can't be compiled to a grammar ({error})")
                    raise refusal.with_client_names(FIELD_BY_SETTING) from None
            try:
                for each in self._requests(reply.id, caller.tenant, request, resolved):
                    job = CompletionJob(each, chosen.name, received_at, reply.arrived, count)
                    self.host.submit(job)
                    reply.jobs.append(job)
                return resolved
            except LorafoldError as error:
                self.cancel_unfinished(reply)
                reply.jobs.clear()
                if self.registry.is_current(chosen):
                    raise self._refusal(error, request, chosen) from None
        message = f"{request.body.model} is being replaced; try again"
        raise Refusal(503, "adapter_changed", message, retry_after=1)

    def _requests(
        self, id: str, tenant: str, request: DialectRequest, resolved: Resolved
    ) -> Iterator[Request]:
        body, renderer, scores = request.body, resolved.chosen.renderer, resolved.prompt_logprobs
        seed = secrets.randbits(48) if body.seed is None else body.seed
        ends = frozenset[int]() if body.ignore_eos else renderer.ends
        for i, prompt in enumerate(p for p in resolved.prompts for _ in range(body.n)):
            yield Request(
                f"{id}.{i}", prompt, self._new_tokens(request, prompt, 1 if scores is None else 0),
                resolved.chosen.key, replace(resolved.sampling, seed=(seed + i) % (1 << 63)),
                ends, tenant, renderer.tokenizer, prompt_logprobs=scores,
            )  # fmt: skip

    def check_grammar(self, grammar: tuple[str, str]) -> None:
        self._sandbox.compile(guidance(grammar))

    async def count(self, caller: Caller, request: DialectRequest) -> int:
        self.check_queue(caller.tenant, 1)

        def counted() -> int:
            renderer = self.registry.choose(caller, request.body.model).renderer
            return sum(map(len, request.render_prompts(renderer)[1]))

        return await self.host.in_thread(counted, caller.tenant)

    def cancel_unfinished(self, reply: Reply) -> None:
        for job in reply.jobs:
            if job.end is None:
                self.host.cancel(job, Refusal(499, "client_left", "the client disconnected"))

    def check_caller(self, caller: Caller, n: int) -> None:
        """Applies `check_queue`, and raises if the tenant has used up its key's limits."""
        self.check_queue(caller.tenant, n)
        self.usage.check(caller)

    def check_queue(self, tenant: str, n: int) -> None:
        """Raises if the queue has no room for n completions, or if the server is not ready."""
        if why := self.host.not_ready:
            raise Refusal(503, "not_ready", why, retry_after=1)
        host, queue, tenant_queue = self.host, self.limits.queue, self.limits.tenant_queue
        for limit, present, verb, code in (
            (queue, host.waiting(), "waiting", "queue_full"),
            (tenant_queue, host.waiting(tenant), "waiting", "tenant_queue_full"),
            (CANCELLED_RATIO * tenant_queue, host.cancelled(tenant), "ending", "tenant_queue_full"),
        ):
            if present + n > limit:
                message = f"this request exceeds the limit: {present} of {limit} completions {verb}"
                later = host.seconds_to_wait
                raise Refusal(429, code, f"{message}; try again later", retry_after=later)

    def _new_tokens(self, request: DialectRequest, prompt: Sequence[int], least: int) -> int:
        length = self.host.backend.length
        if not prompt:
            raise invalid(request.field, "found no tokens, expected at least one")
        left = length - len(prompt)
        new = left if request.max_new_tokens is None else request.max_new_tokens
        if new < least <= left:
            raise invalid("max_tokens", f"found {new}, expected {least} or more")
        if left < least or new > left:
            wanted = max(new, least)  # clients recognize the start of this message
            message = (
                f"This model's maximum context length is {length} tokens. However, you requested"
                f" {len(prompt) + wanted} tokens ({len(prompt)} in the {request.field}, {wanted} in"
                " the completion); shorten the prompt or request a shorter completion"
            )
            raise Refusal(400, "context_length_exceeded", message, request.field)
        return new

    def _refusal(
        self, error: LorafoldError, request: DialectRequest, chosen: ServedModel
    ) -> Refusal:
        if why := self.host.not_ready:
            return Refusal(503, "not_ready", why, retry_after=1)
        message = str(error).partition(": ")[2]  # without the request's id
        if chosen.key and self.host.backend.states().is_quarantined(chosen.key):
            return Refusal(423, "adapter_quarantined", message, "model")
        refusal = Refusal(400, "invalid_value", message, message.partition(":")[0])
        return refusal.with_client_names(FIELD_BY_SETTING | {"prompt": request.field})
