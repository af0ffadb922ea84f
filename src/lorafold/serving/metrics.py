"""What is counted, for `/metrics` in Prometheus's format and for the page.

Labels are the tenants of the key file, the adapters of the directory, and the codes of refusals: no
caller can make a new one. Those beyond MOST of a kind share the label `other`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from statistics import median

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Count

from lorafold.serving.backend import Ended, Token
from lorafold.serving.job import CompletionJob

MOST = 200
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FEW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)  # where every adapter has them
BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class Use:
    """What an adapter was used for lately."""

    def __init__(self) -> None:
        self.requests = self.tokens = 0
        self._firsts: deque[float] = deque(maxlen=64)

    def first(self, seconds: float) -> None:
        """Count a first token after so many seconds."""
        self._firsts.append(seconds)

    @property
    def first_token_ms(self) -> float | None:
        """The median time to the first token, in milliseconds."""
        return round(1000 * median(self._firsts), 1) if self._firsts else None


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._names: dict[str, set[str]] = {"tenant": set(), "adapter": set()}
        self.uses: dict[str, Use] = {}
        self.requests = self._count(
            "requests", "Requests by outcome", ("tenant", "adapter", "outcome")
        )
        self.tokens = self._count("tokens", "Tokens", ("tenant", "kind"))
        self.adapter_tokens = self._count(
            "adapter_tokens", "Tokens by adapter", ("adapter", "kind")
        )
        self.restarts = self._count("engine_restarts", "Starts of the engine after the first")
        self.quarantines = self._count("quarantines", "Adapters that were put in quarantine")
        self.queue = self._seconds("queue", "From a request's arrival to its slot")
        self.first = self._seconds("first_token", "From a request's arrival to its first token")
        self.adapter_first = self._seconds(
            "adapter_first_token", "To the first token, by adapter", FEW, ("adapter",)
        )
        self.between = self._seconds("between_tokens", "Between two tokens of a request", BETWEEN)
        self.whole = self._seconds("request", "From a request's arrival to its end")

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Show a value as it is when it is asked for."""
        Gauge(f"lorafold_{name}", about, registry=self.registry).set_function(value)

    def arrived(self, job: CompletionJob, events: Sequence[Token | Ended]) -> None:
        """Count what arrived of a job, after `Job.put`."""
        use = self.uses.setdefault(job.adapter, Use())
        adapter = self.label("adapter", job.adapter)
        new = sum(isinstance(event, Token) for event in events)
        now = time.monotonic()
        if new and job.before is None:
            self.first.observe(now - job.asked)
            self.adapter_first.labels(adapter).observe(now - job.asked)
            use.first(now - job.asked)
            if job.began is not None:
                self.queue.observe(job.began - job.asked)
        elif job.before is not None:
            for _ in range(new):
                self.between.observe((now - job.before) / new)
        use.tokens += new
        if job.end is not None:
            tenant = self.label("tenant", job.request.tenant)
            use.requests += 1
            counts = Counter(prompt=len(job.request.prompt), completion=len(job.end.tokens))
            counts["cached"] = job.end.cached
            for kind, n in counts.items():
                self.tokens.labels(tenant, kind).inc(n)
                self.adapter_tokens.labels(adapter, kind).inc(n)
            self.whole.observe(now - job.asked)

    def ended(self, tenant: str, adapter: str, outcome: str) -> None:
        """Count a request.

        Args:
            outcome: ok, or the code of a refusal.
        """
        labels = self.label("tenant", tenant), self.label("adapter", adapter)
        self.requests.labels(*labels, outcome).inc()

    def label(self, kind: str, name: str) -> str:
        """The name as a label."""
        names = self._names[kind]
        if len(names) < MOST:
            names.add(name)
        return name if name in names else "other"

    def labels(self, kind: str, names: Sequence[str]) -> dict[str, str]:
        """The labels of names, as `label` would give them, without one of them taking a place.

        Args:
            kind: what they are names of.
        """
        taken = self._names[kind]
        free = [name for name in names if name not in taken][: max(0, MOST - len(taken))]
        shown = taken.union(free)
        return {name: name if name in shown else "other" for name in names}

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self.registry)

    def _count(self, name: str, about: str, labels: Sequence[str] = ()) -> Count:
        return Count(f"lorafold_{name}", about, labels, registry=self.registry)

    def _seconds(
        self, name: str, about: str, buckets: Sequence[float] = SECONDS, labels: Sequence[str] = ()
    ) -> Histogram:
        named = f"lorafold_{name}_seconds"
        return Histogram(named, about, labels, registry=self.registry, buckets=tuple(buckets))
