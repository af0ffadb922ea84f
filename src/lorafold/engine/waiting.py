"""Rows that wait for a slot, the tenant who was served least first.

    waiting = Waiting({"gold": 2.0})
    waiting.add(row)
    waiting.first()             the oldest row of the tenant with the smallest counter
    waiting.charge("gold", 64)  what it was given

Every tenant has a counter of the tokens that it was given, one of a completion counted as OUT of a
prompt, over its weight. One that begins to wait anew starts no lower than the others who wait, so
that nobody saves up for a burst. That is the virtual token counter of Sheng et al. 2024, Fairness
in Serving Large Language Models (OSDI), algorithm 2. With one tenant rows run as they came.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping

from lorafold.engine.row import Row

COMPANY = 30.0  # seconds for which a tenant whose row came counts as one who shares the engine
OUT = 2  # a token of a completion costs a pass, one of a prompt a part of one (paper, sec. 4)


class Waiting:
    """The rows that wait, by tenant.

    Args:
        weights: the shares of tenants; 1 for one that is not named.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._rows: dict[str, deque[Row]] = {}  # of tenants who wait
        self._given: dict[str, float] = {}
        self._came: dict[str, float] = {}  # when a tenant's last row came
        self._last = 0.0  # the counter of whoever stopped waiting last

    def add(self, row: Row) -> None:
        """Let a row wait."""
        tenant = row.request.tenant
        self._came[tenant] = time.monotonic()
        if tenant not in self._rows:
            least = min((self._given[t] for t in self._rows), default=self._last)
            self._given[tenant] = max(self._given.get(tenant, 0.0), least)
            self._rows[tenant] = deque()
        self._rows[tenant].append(row)

    def alone(self, tenant: str) -> bool:
        """Whether no other tenant's row came lately."""
        since = time.monotonic() - COMPANY
        return not any(came > since for other, came in self._came.items() if other != tenant)

    def remove(self, row: Row) -> None:
        """Let a row wait no longer."""
        tenant = row.request.tenant
        self._rows[tenant].remove(row)
        if not self._rows[tenant]:
            del self._rows[tenant]
            self._last = self._given[tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        """Count tokens that a tenant is given."""
        cost = tokens / self._weights.get(tenant, 1.0)
        self._given[tenant] = self._given.get(tenant, 0.0) + cost

    def first(self, asked: Collection[Row], full: Collection[str]) -> Row | None:
        """The row to run next: the oldest of the tenant who was given least.

        Args:
            asked: rows that can't run yet; of two tenants the one with fewer of them comes first.
            full: tenants who have all the slots that they may have.
        """
        tenants = [row.request.tenant for row in asked]
        free = [tenant for tenant in self._rows if tenant not in full]
        for tenant in sorted(free, key=lambda t: (tenants.count(t), self._given[t])):
            for row in self._rows[tenant]:
                if row not in asked:
                    return row
        return None

    def __iter__(self) -> Iterator[Row]:
        return (row for rows in self._rows.values() for row in rows)

    def __contains__(self, row: Row) -> bool:
        return row in self._rows.get(row.request.tenant, ())
