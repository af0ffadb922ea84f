"""Chooses the rows of the next forward passes.

Each step decodes all rows that have one pending token, and then prefills at most `budget` tokens,
so that long prompts don't delay decoding for long. If running rows of one adapter and tenant have a
common prefix, the first of them prefills it for all.

`WaitingQueue` implements the virtual token counter of Sheng et al. 2024, Fairness in Serving Large
Language Models (OSDI), algorithm 2. It serves the tenant with the smallest counter. A tenant's
counter grows by its tokens divided by its weight, with completion tokens counted COMPLETION_COST
times. When a tenant starts to wait again, its counter is raised to the smallest counter of the
waiting tenants.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from lorafold.engine.kv_cache import BLOCK
from lorafold.engine.request import EngineSettings
from lorafold.engine.runner import is_planned, separate_adapter
from lorafold.engine.sequence import Row

PRESENCE_SECONDS = 30.0  # a tenant counts as present for this time after its last request
COMPLETION_COST = 2  # cost of a completion token relative to a prompt token (paper, sec. 4)


class WaitingQueue:
    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._rows: dict[str, deque[Row]] = {}  # only tenants with waiting rows
        self._used: dict[str, float] = {}
        self._last_arrival: dict[str, float] = {}  # time of each tenant's last request
        self._last = 0.0  # counter of the tenant whose last row left the queue most recently

    def add(self, row: Row) -> None:
        tenant = row.request.tenant
        self._last_arrival[tenant] = time.monotonic()
        if tenant not in self._rows:
            least = min((self._used[t] for t in self._rows), default=self._last)
            self._used[tenant] = max(self._used.get(tenant, 0.0), least)
            self._rows[tenant] = deque()
        rows = self._rows[tenant]
        (rows.append if row.stream.began is None else rows.appendleft)(row)

    def is_only_tenant(self, tenant: str) -> bool:
        others = (at for other, at in self._last_arrival.items() if other != tenant)
        return not any(at > time.monotonic() - PRESENCE_SECONDS for at in others)

    def remove(self, row: Row) -> None:
        tenant = row.request.tenant
        self._rows[tenant].remove(row)
        if not self._rows[tenant]:
            del self._rows[tenant]
            self._last = self._used[tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        self._used[tenant] = self._used.get(tenant, 0.0) + tokens / self._weights.get(tenant, 1.0)

    def next_row(self, unready: Collection[Row], full: Collection[str]) -> Row | None:
        """Returns the oldest ready request of the tenant with the fewest requests in `unready` or,
        among equals, the smallest counter. Tenants in `full` get no more slots.
        """
        tenants = [row.request.tenant for row in unready]
        free = [tenant for tenant in self._rows if tenant not in full]
        for tenant in sorted(free, key=lambda t: (tenants.count(t), self._used[t])):
            for row in self._rows[tenant]:
                if row not in unready:
                    return row
        return None

    def __iter__(self) -> Iterator[Row]:
        return (row for rows in self._rows.values() for row in rows)

    def __contains__(self, row: Row) -> bool:
        return row in self._rows.get(row.request.tenant, ())


class Batch(NamedTuple):
    rows: list[Row]
    counts: list[int]


class Scheduler:
    def __init__(self, settings: EngineSettings, single: bool, planned: bool = False) -> None:
        self.planned = planned
        self.slots, self.chunk, self.invariant = settings.slots, settings.chunk, settings.invariant
        self.budget, self.single = max(settings.budget, settings.chunk), single
        self.prefix_reuse = settings.prefix_reuse
        self.max_per_tenant, self.waiting = settings.tenant_slots, WaitingQueue(settings.weights)
        self.running: list[Row] = []

    def admit(self, fits: Callable[[Row], bool], ready: Callable[[Row], bool]) -> Iterator[Row]:
        unready: list[Row] = []
        for _ in range(self.slots - len(self.running)):
            row = self.waiting.next_row(unready, self._full())
            # the others wait too, because small requests could delay a large one forever
            if row is None or not fits(row):
                return
            if not ready(row):
                unready.append(row)
                continue
            self.waiting.remove(row)
            self.running.append(row)
            if row.stream.began is None:  # not one that made room and computes again
                self.waiting.charge(row.request.tenant, len(row.request.prompt))
            yield row

    def _full(self) -> list[str]:
        if self.max_per_tenant is None:
            return []
        running, shared = Counter(row.request.tenant for row in self.running), self.slots // 2
        return [
            tenant
            for tenant, n in running.items()
            if n >= self.max_per_tenant
            or (n >= max(1, shared) and not self.waiting.is_only_tenant(tenant))
        ]

    def decode_batches(self) -> list[Batch]:
        """Returns a batch of requests whose adapters can be mixed, and one per other adapter."""
        decoded = [row for row in self.running if row.prefiller is None and row.num_pending == 1]
        for row in decoded:
            self.waiting.charge(row.request.tenant, COMPLETION_COST)
        return [Batch(rows, [1] * len(rows)) for rows in self._groups(decoded)]

    def prefill_batches(self) -> list[Batch]:
        left, batches = self.budget, []
        read = [row for row in self.running if row.prefiller is None and row.num_pending > 1]
        for rows in self._groups(read):
            while rows and left > 0:
                batch = self._next_batch(rows, left)
                if not batch.rows:
                    break
                batches.append(batch)
                left -= len(batch.rows) * max(batch.counts)
                rows = rows[len(batch.rows) :]
        return batches

    def share_prefill(self, row: Row) -> None:
        """Lets a request wait for another that prefills the same prompt, or at least another block
        of a common prefix. Adapters that can't be mixed are excluded, because their requests' cache
        may contain more than keys and values.
        """
        row.prefiller = None
        if separate_adapter(row) is not None:
            return
        others = [other for other in self.running if other is not row]
        common = [(other.common_prefix(row, self.prefix_reuse), other) for other in others]
        n, other = max(common, key=lambda pair: pair[0], default=(0, None))
        if n >= row.computed + BLOCK or n == len(row.tokens):
            row.prefiller, row.awaited = other, n

    def waiting_for(self, prefiller: Row) -> list[Row]:
        return [row for row in self.running if row.prefiller is prefiller]

    def remove(self, row: Row) -> None:
        """Removes a running request. If others wait for its prefill, one of them takes over."""
        self.running.remove(row)
        for other in self.waiting_for(row):
            self.share_prefill(other)

    def _next_batch(self, rows: Sequence[Row], left: int) -> Batch:
        taken: list[Row] = []
        width = 0
        for row in rows if not self.invariant else rows[:1]:
            wider = max(width, min(row.num_pending, self.chunk))
            if taken and (len(taken) + 1) * wider > left:
                break
            taken, width = [*taken, row], wider
        if len(taken) == 1 and width > left < self.budget:
            return Batch([], [])  # the row waits for the next step's budget
        return Batch(taken, [min(row.num_pending, self.chunk) for row in taken])

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        groups: dict[object, list[Row]] = {}
        for row in rows:
            separate = separate_adapter(row)
            alone = self.single or (self.invariant and separate is not None)
            # rows that need logits of all their tokens run in separate passes
            scored, planned = row.to_score(row.num_pending) > 0, self.planned and is_planned(row)
            key = separate, scored, planned, row.request.id if alone else None
            groups.setdefault(key, []).append(row)
        return list(groups.values())
