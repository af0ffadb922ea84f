"""Metrics in Prometheus format, and for the web page.

Labels are tenants, adapters and codes of refusals, so clients can't create any. Tenants and
adapters beyond MAX_LABELS each share the label `other`. `Gauges` also contains the vLLM metrics
that routers use, for example the Kubernetes Gateway API Inference Extension.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as Count
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafold.serving.backend import AdapterFiles, Ended, States, Token
from lorafold.serving.completion_job import CompletionJob
from lorafold.serving.keys import Keys

if TYPE_CHECKING:
    from lorafold.serving.host import Host
    from lorafold.serving.registry import Registry

MAX_LABELS = 200
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COARSE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)  # for metrics per adapter
FINE = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class AdapterUse:
    def __init__(self) -> None:
        self.requests = self.tokens = 0
        self.first_token_times: deque[float] = deque(maxlen=64)  # recent seconds to the first token

    @property
    def first_token_ms(self) -> float | None:
        return round(1000 * median(self.first_token_times), 1) if self.first_token_times else None


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._names: dict[str, set[str]] = {"tenant": set(), "adapter": set()}
        self.uses: dict[str, AdapterUse] = {}
        count = partial(Count, registry=self.registry)
        seconds = partial(Histogram, registry=self.registry, buckets=BUCKETS)
        self.requests = count(
            "lorafold_requests", "Requests by outcome", ("tenant", "adapter", "outcome")
        )
        self.tokens = count("lorafold_tokens", "Tokens by kind", ("tenant", "kind"))
        self.adapter_tokens = count(
            "lorafold_adapter_tokens", "Tokens by adapter and kind", ("adapter", "kind")
        )
        self.restarts = count("lorafold_engine_restarts", "Restarts of the engine")
        self.quarantines = count("lorafold_quarantines", "Adapters put in quarantine")
        self.queue_seconds = seconds("lorafold_queue_seconds", "Seconds from arrival to a slot")
        self.first_token_seconds = seconds(
            "lorafold_first_token_seconds", "Seconds from arrival to the first token"
        )
        self.adapter_first_token_seconds = seconds(
            "lorafold_adapter_first_token_seconds",
            "Seconds from arrival to the first token, by adapter", ("adapter",), buckets=COARSE,
        )  # fmt: skip
        self.between_tokens_seconds = seconds(
            "lorafold_between_tokens_seconds", "Seconds between two tokens", buckets=FINE
        )
        self.total_seconds = seconds("lorafold_request_seconds", "Seconds from arrival to the end")

    def observe_events(self, job: CompletionJob, events: Sequence[Token | Ended]) -> None:
        use = self.uses.setdefault(job.adapter, AdapterUse())
        adapter = self.label("adapter", job.adapter)
        new = sum(isinstance(event, Token) for event in events)
        now = time.monotonic()
        waited = now - job.received_at
        if new and job.previous_time is None:
            self.first_token_seconds.observe(waited)
            self.adapter_first_token_seconds.labels(adapter).observe(waited)
            use.first_token_times.append(waited)
            if job.began is not None:
                self.queue_seconds.observe(job.began - job.received_at)
        elif job.previous_time is not None:
            for _ in range(new):
                self.between_tokens_seconds.observe((now - job.previous_time) / new)
        use.tokens += new
        if job.end is not None:
            tenant = self.label("tenant", job.request.tenant)
            use.requests += 1
            prompt, new = len(job.request.prompt), len(job.end.tokens)
            for kind, n in (("prompt", prompt), ("completion", new), ("cached", job.end.cached)):
                self.tokens.labels(tenant, kind).inc(n)
                self.adapter_tokens.labels(adapter, kind).inc(n)
            self.total_seconds.observe(waited)

    def count_request(self, tenant: str, adapter: str, outcome: str) -> None:
        labels = self.label("tenant", tenant), self.label("adapter", adapter)
        self.requests.labels(*labels, outcome).inc()

    def label(self, kind: str, name: str) -> str:
        names = self._names[kind]
        if len(names) < MAX_LABELS:
            names.add(name)
        return name if name in names else "other"

    def labels(self, kind: str, names: Sequence[str]) -> dict[str, str]:
        used = self._names[kind]
        free = [name for name in names if name not in used][: max(0, MAX_LABELS - len(used))]
        return {name: name if name in used.union(free) else "other" for name in names}


class Gauges(Collector):
    def __init__(self, metrics: Metrics, host: Host, registry: Registry, keys: Keys) -> None:
        self._metrics, self._host, self._registry, self._keys = metrics, host, registry, keys

    def describe(self) -> Iterable[Metric]:
        """Returns no names, because no other collector has the same names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        host, now, jobs = self._host, self._host.backend.states(), list(self._host.jobs.values())
        slots, waiting, running = host.settings.slots, host.waiting(), host.running()
        for name, about, value in (
            ("keys_outdated", "1 if the key file can't be read and the earlier keys still apply",
             self._keys.refresh()),
            ("ready", "1 if the server is ready to compute requests", not host.not_ready),
            ("waiting", "Requests in admission and completions waiting for a slot", waiting),
            ("running", "Running completions", running),
            ("slots", "Maximum number of running completions", slots),
            ("adapter_bytes", "Bytes of adapters in memory", now.nbytes),
            ("adapter_reads", "Loads of adapters from their files", now.reads),
            ("adapter_evictions", "Adapters evicted from memory", now.evictions),
            ("adapters_damaged", "Adapters whose memory was corrupted", now.damaged),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"lorafold_{name}", about, value=value)
        yield from self._adapters(now)
        slots = 1 if now.alone else slots
        tokens = sum(len(job.request.prompt) + job.tokens for job in jobs if job.began)
        for name, about, share in (
            ("num_requests_waiting", "The same as lorafold_waiting", waiting),
            ("num_requests_running", "The same as lorafold_running", running),
            ("kv_cache_usage_perc", "Fraction of the KV cache used by running completions, 0 to 1",
             min(1.0, tokens / now.kv_tokens)),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"vllm:{name}", about, value=share)
        values = [str(slots)]  # any slot can run any adapter
        for runs in (True, False):
            names = {job.adapter for job in jobs if bool(job.began) == runs} - {self._registry.base}
            values.append(",".join(sorted(names)[:MAX_LABELS]))
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        about = "Unix time, labelled with the adapters of running and waiting requests"
        yield _labelled("vllm:lora_requests_info", about, labels, {tuple(values): time.time()})

    def _adapters(self, now: States) -> Iterator[Metric]:
        states, seconds = Counter[tuple[str, ...]](), dict[tuple[str, ...], float]()
        adapters = sorted(self._registry.adapters.values(), key=lambda adapter: adapter.name)
        labels = self._metrics.labels("adapter", [adapter.name for adapter in adapters])
        for adapter in adapters:
            name = labels[adapter.name]
            states[name, state_of(self._registry, adapter, now)[0]] += 1
            if (seconds_to_load := now.seconds.get(adapter.key)) is not None:
                seconds[name,] = max(seconds_to_load, seconds.get((name,), 0.0))
        about = "Adapters in this state: 1 for an adapter with its own label"
        yield _labelled("lorafold_adapter_state", about, ("adapter", "state"), states)
        about = "Seconds of the adapter's last load, including checks"
        yield _labelled("lorafold_adapter_load_seconds", about, ("adapter",), seconds)


def _labelled(
    name: str, about: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]
) -> Metric:
    gauge = GaugeMetricFamily(name, about, labels=labels)
    for each, value in values.items():
        gauge.add_metric(each, value)
    return gauge


def state_of(registry: Registry, adapter: AdapterFiles, now: States) -> tuple[str, int]:
    state, nbytes = now.adapters.get(adapter.key, ("cold", 0))
    return ("quarantined" if adapter.name in registry.state.quarantined else state), nbytes
