"""What is known of one adapter, and whether what is in memory is still what was read.

    state.sum                   a checksum of the adapter's tensors as they were read
    state.intact()              whether they have it still
    state.strikes               its requests that failed since the logits were not finite

The checksum is the sum of all bytes as integers of 64 bits, which any one flipped bit changes: it
takes 0.2 ms for 10 MB, where CRC-32 takes 1.4 (two cores of an AMD EPYC).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lorafold.engine.adapters import KnownAdapter, LoadedAdapter
from lorafold.errors import LorafoldError

Status = Literal["cold", "loading", "resident", "quarantined"]


class State:
    """One entry: what is in memory, who needs it, and what went wrong with it."""

    def __init__(self, references: int = 0) -> None:
        self.held: LoadedAdapter | None = None
        self.future: Future[None] | None = None
        self.error: LorafoldError | None = None
        self.references = references
        self.leases = self.used = self.vocabulary = 0
        self.reserved = False  # read for a request that has not run yet
        self.sum = self.looked = self.strikes = 0

    def hold(self, held: LoadedAdapter, used: int) -> None:
        """Keep an adapter that was just read."""
        self.held, self.used, self.looked, self.sum = held, used, used, checksum(held)
        self.vocabulary = held.vocabulary or 0

    def refuse(self, name: str, strikes: int) -> None:
        """Raise LorafoldError if so many requests failed that nobody may use it any more."""
        if self.strikes >= strikes:
            raise LorafoldError(
                f"adapter {name!r}: in quarantine, since the logits of {self.strikes} of its"
                " requests were not finite; load other files under this name"
            )

    def status(self, strikes: int) -> Status:
        """Where it is; in quarantine after so many strikes."""
        if self.strikes >= strikes:
            return "quarantined"
        return "resident" if self.held else "loading" if self.future else "cold"

    @property
    def nbytes(self) -> int:
        """The bytes that it has in memory."""
        return self.held.nbytes if self.held else 0

    def intact(self) -> bool:
        """Whether what is in memory is what was read."""
        return self.held is None or checksum(self.held) == self.sum


def warm(
    names: Mapping[str, KnownAdapter], states: Mapping[KnownAdapter, State], strikes: int
) -> dict[str, tuple[Status, int]]:
    """Where the entries are that are not cold, by name, and their bytes in memory. Most of many
    adapters are cold, and nothing is computed for those.

    Args:
        names: the entries that names stand for now.
        strikes: as `State.status` takes them.
    """
    found = [(e, s) for e, s in states.items() if s.held or s.future or s.strikes]
    return {e.name: (s.status(strikes), s.nbytes) for e, s in found if names.get(e.name) == e}


def evict(states: Iterable[State], nbytes: int) -> int | None:
    """Let adapters leave until so many bytes are free, the least recently used first, and return
    how many left; None if all together have fewer, and then none leaves.
    """
    found = [(state, state.held.nbytes) for state in states if state.held]
    if nbytes > sum(n for _, n in found):
        return None
    left = 0
    for state, n in sorted(found, key=lambda one: one[0].used):
        if nbytes > 0:
            state.held, nbytes, left = None, nbytes - n, left + 1
    return left


def balanced(states: Mapping[KnownAdapter, State], names: Mapping[str, KnownAdapter]) -> None:
    """Raise AssertionError if the books of these entries do not balance."""
    for entry, state in states.items():
        assert 0 <= state.leases <= state.references, entry
        assert not state.leases or state.held, f"{entry}: leased, not resident"
        current = names.get(entry.name) == entry
        assert current or state.references or state.future, f"{entry}: left over"


def look(states: Iterable[State], now: int) -> bool:
    """Whether the adapter in memory that was not looked at for longest, of those that nothing uses,
    is what was read; if not, it leaves. One without files is what it is on the model.
    """
    read = [s for s in states if s.held and s.held.entry.path]
    idle = [s for s in read if not (s.leases or s.reserved)]
    if not idle:
        return True
    state = min(idle, key=lambda s: s.looked)
    state.looked = now
    intact = state.intact()
    state.held = state.held if intact else None
    return intact


def checksum(held: LoadedAdapter) -> int:
    """A sum over the bytes of all tensors."""
    storages = {t.untyped_storage().data_ptr(): t for t in held.tensors}
    return sum(map(_sum, storages.values()))


def _sum(tensor: Tensor) -> int:
    content = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    content = content.set_(tensor.detach().untyped_storage())
    whole = len(content) // 8 * 8
    # torch would wake a team of threads, which then spins for longer than this takes
    numbers = content.cpu().numpy()
    return int(numbers[:whole].view(np.int64).sum()) + int(numbers[whole:].sum())
