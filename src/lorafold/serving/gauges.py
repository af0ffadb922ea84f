"""What `/metrics` shows as it is when it is asked for: the state of every adapter, and the gauges
of vLLM by which routers choose a server.

The gateway API inference extension of Kubernetes reads, by these names: how many requests wait and
run, how full the cache is, and which adapters have requests. The last one is a gauge whose labels
list them and whose value is the time, since the newest of several sets of labels is the one that
holds. Adapters take slots as the base does, so that as many as there are slots run at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafold.serving.backend import Found, States
from lorafold.serving.host import Host
from lorafold.serving.metrics import MOST, Metrics
from lorafold.serving.registry import Registry


class Gauges(Collector):
    """The gauges of one server.

    Args:
        metrics: bounds the labels.
    """

    def __init__(self, metrics: Metrics, host: Host, registry: Registry) -> None:
        self._metrics, self._host, self._registry = metrics, host, registry

    def describe(self) -> Iterable[Metric]:
        """Nothing: no other collector has these names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The values as they are now."""
        yield from self._adapters()
        yield from self._router()

    def _adapters(self) -> Iterator[Metric]:
        states, seconds = Counter[tuple[str, str]](), dict[str, float]()
        now = self._host.backend.states()
        all_found = sorted(self._registry.found.values(), key=lambda found: found.name)
        labels = self._metrics.labels("adapter", [found.name for found in all_found])
        for found in all_found:
            name = labels[found.name]
            states[name, state_of(self._registry, found, now)[0]] += 1
            if (took := now.seconds.get(found.key)) is not None:
                seconds[name] = max(took, seconds.get(name, 0.0))
        told = "Adapters in this state, one where the adapter has a label of its own"
        state = GaugeMetricFamily("lorafold_adapter_state", told, labels=("adapter", "state"))
        for one, n in states.items():
            state.add_metric(one, n)
        told = "How long it took to read and check the adapter the last time"
        load = GaugeMetricFamily("lorafold_adapter_load_seconds", told, labels=("adapter",))
        for name, took in seconds.items():
            load.add_metric((name,), took)
        yield state
        yield load

    def _router(self) -> Iterator[Metric]:
        host = self._host
        jobs = list(host.jobs.values())
        slots = 1 if host.backend.states().alone else host.settings.slots
        held = sum(len(job.request.prompt) + job.tokens for job in jobs if job.began)
        for name, told, value in (
            ("num_requests_waiting", "Completions that wait for a slot", host.waiting()),
            ("num_requests_running", "Completions that run", host.running()),
            ("kv_cache_usage_perc", "The part of all slots' positions that running completions"
             " take, 0 to 1", min(1.0, held / (slots * host.backend.length))),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"vllm:{name}", told, value=value)
        base = {self._registry.base}
        adapters = {
            runs: sorted({job.adapter for job in jobs if bool(job.began) == runs} - base)
            for runs in (True, False)
        }
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "The time, with the adapters of requests", labels=names
        )
        running, waiting = (",".join(adapters[runs][:MOST]) for runs in (True, False))
        info.add_metric((str(slots), running, waiting), time.time())
        yield info


def state_of(registry: Registry, found: Found, now: States) -> tuple[str, int]:
    """Where an adapter is, `cold`, `loading`, `resident` or `quarantined`, and its bytes in memory.

    Args:
        now: where those are that are not cold.
    """
    state, nbytes = now.adapters.get(found.key, ("cold", 0))
    return ("quarantined" if found.name in registry.kept.quarantined else state), nbytes
