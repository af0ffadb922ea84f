"""Which adapters are in memory.

    cold -> loading -> resident -> cold ...

A name stands for one entry at a time: loading other files under it makes a new entry, and requests
keep the one that they were submitted with. An entry has a reference for each request that waits or
runs and a lease for each that runs. Where bytes are limited, the least recently used adapters leave
that have no lease, are not pinned, and are not about to be used; they are read and verified again
when a request needs them. An entry whose name was unloaded is forgotten with its last reference.

One whose requests failed too often, since the model's logits were not finite, is in quarantine: it
is refused until other files are loaded under its name.

One whose tensors changed in memory leaves. A checksum tells: the sum of all bytes as integers of 64
bits, which any one flipped bit changes. It takes 0.2 ms for 10 MB, where CRC-32 takes 1.4 (two
cores of an AMD EPYC).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lorafold.engine.adapters import KnownAdapter, LoadedAdapter, Reader, VerifiedAdapter
from lorafold.errors import LorafoldError
from lorafold.runtime.processor import alone

Status = Literal["cold", "loading", "resident", "quarantined"]


class ResidentAdapter:
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


class Residency:
    """The adapters of one engine. Any thread may call it."""

    def __init__(
        self,
        reader: Reader,
        budget: int | None = None,
        changed: Callable[[], None] = lambda: None,
        strikes: int = 3,
    ) -> None:
        self._verified, self._read = reader.verified, reader.read
        self.budget, self._changed, self.strikes = budget, changed, strikes
        self.reads = self.evictions = self.damaged = 0  # adapters; damaged ones changed in memory
        self.seconds: dict[str, float] = {}  # that reading the adapter of a name took
        self._lock = threading.RLock()
        self._names: dict[str, KnownAdapter] = {}
        self._states: dict[KnownAdapter, ResidentAdapter] = {}
        self._pinned: set[str] = set()
        # read in vain: there was no room until something leaves
        self._blocked: set[KnownAdapter] = set()
        self._worker = ThreadPoolExecutor(1, "lorafold-adapters", initializer=alone)
        self._clock, self._generations = itertools.count(1), itertools.count(1)

    def load(
        self, name: str, path: str | Path, stack: Sequence[VerifiedAdapter] = ()
    ) -> Future[None]:
        """Make an adapter known under a name and read it; the future has the error if that fails,
        and then the name is what it was.
        """
        if not name:
            raise LorafoldError("adapter name: found '', expected at least one character")
        found = tuple(stack) or self._verified(path)
        with self._lock:
            known = self._names.get(name)
            if known is not None and (known.path, known.stack) == (Path(path), found):
                return self._start(known)
            entry = KnownAdapter(name, Path(path), found, next(self._generations))
            self._states[entry] = ResidentAdapter(references=1)  # until it has its name
            return self._start(entry, naming=True)

    def know(self, name: str, path: str | Path, stack: Sequence[VerifiedAdapter]) -> None:
        """Make an adapter known without reading it, which a request will."""
        with self._lock:
            entry = KnownAdapter(name, Path(path), tuple(stack), next(self._generations))
            self._put(entry, ResidentAdapter())

    def adopt(self, name: str, make: Callable[[KnownAdapter], LoadedAdapter]) -> None:
        """Make an adapter without files known under a name; it stays in memory until `unload`."""
        with self._lock:
            entry, state = KnownAdapter(name, None, (), next(self._generations)), ResidentAdapter()
            state.hold(make(entry), next(self._clock))
            self._put(entry, state)

    def unload(self, name: str) -> None:
        """Forget a name. Requests that have its adapter finish with it. Raises as `entry`."""
        with self._lock:
            entry = self.entry(name)
            del self._names[name]
            self._pinned.discard(name)
            self.seconds.pop(name, None)
            self._forget(entry)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep the adapter of that name in memory, or no longer. Raises as `entry`."""
        with self._lock:
            self.entry(name)
            (self._pinned.add if pinned else self._pinned.discard)(name)
            self._blocked.clear()

    def evict(self, name: str) -> bool:
        """Let the adapter of that name leave memory; False if it is in use or pinned."""
        with self._lock:
            entry = self.entry(name)
            if not self._evictable(entry):
                return False
            self._states[entry].held = None
            self.evictions += 1
            self._blocked.clear()
            return True

    def entry(self, name: str) -> KnownAdapter:
        """The entry that a name stands for."""
        with self._lock:
            if name not in self._names:
                known = ", ".join(sorted(self._names)[:8]) or "none"
                raise LorafoldError(
                    f"adapter: found {name!r}, expected one of those loaded: {known}"
                )
            return self._names[name]

    def bind(self, name: str) -> KnownAdapter:
        """The entry of a name, with one more reference. Raises as `entry`, or in quarantine."""
        with self._lock:
            entry = self.entry(name)
            self._states[entry].refuse(entry.name, self.strikes)
            self._states[entry].references += 1
            return entry

    def unbind(self, entry: KnownAdapter) -> None:
        """Give back a reference."""
        with self._lock:
            state = self._states[entry]
            state.references -= 1
            if not state.references:
                state.reserved = False
                self._blocked.clear()
                self._forget(entry)

    def lease(self, entry: KnownAdapter) -> LoadedAdapter | None:
        """The adapter, kept in memory until `release`; None if it is being read."""
        with self._lock:
            state = self._states[entry]
            state.refuse(entry.name, self.strikes)
            if state.error is not None:
                error, state.error = state.error, None
                raise error
            if state.held is None:
                if entry not in self._blocked:
                    self._start(entry, reserve=True)
                return None
            state.leases, state.reserved, state.used = state.leases + 1, False, next(self._clock)
            return state.held

    def release(self, entry: KnownAdapter) -> None:
        """Give back a lease."""
        with self._lock:
            self._states[entry].leases -= 1
            self._blocked.clear()
        self._changed()

    def strike(self, entry: KnownAdapter) -> None:
        """Count a request that failed by logits that are not finite."""
        with self._lock:
            self._states[entry].strikes += 1

    def look(self) -> None:
        """Compare the adapter that was not looked at for longest, of those that nothing uses, with
        what was read; one that changed leaves. One without files is what it is on the model.
        """
        with self._lock:
            read = [s for s in self._states.values() if s.held and s.held.entry.path]
            if idle := [s for s in read if not (s.leases or s.reserved)]:
                state = min(idle, key=lambda s: s.looked)
                state.looked = next(self._clock)
                if state.held and checksum(state.held) != state.sum:
                    state.held, self.damaged = None, self.damaged + 1

    def status(self, name: str) -> Status:
        """Where the adapter of a name is. Raises as `entry`."""
        with self._lock:
            return self._states[self.entry(name)].status(self.strikes)

    def warm(self) -> dict[str, tuple[Status, int]]:
        """Where all adapters are that are not cold, by name, and their bytes in memory. Most of
        many are cold, and nothing is computed for those.
        """
        with self._lock:
            found = [(e, s) for e, s in self._states.items() if s.held or s.future or s.strikes]
            return {
                e.name: (s.status(self.strikes), s.held.nbytes if s.held else 0)
                for e, s in found
                if self._names.get(e.name) == e
            }

    def vocabulary(self, entry: KnownAdapter | None) -> int:
        """The tokens that an adapter knows, 0 if it adds none to the model's."""
        with self._lock:
            return 0 if entry is None else self._states[entry].vocabulary

    def names(self) -> tuple[str, ...]:
        """The names that are known."""
        return tuple(self._names)

    @property
    def nbytes(self) -> int:
        """The bytes of all resident adapters that were read from files."""
        with self._lock:
            return sum(s.held.nbytes for e, s in self._states.items() if s.held and e.path)

    def check(self) -> None:
        """Raise AssertionError if the books do not balance."""
        with self._lock:
            for entry, state in self._states.items():
                assert 0 <= state.leases <= state.references, entry
                assert not state.leases or state.held, f"{entry}: leased, not resident"
                current = self._names.get(entry.name) == entry
                assert current or state.references or state.future, f"{entry}: left over"
            assert self.budget is None or self.nbytes <= self.budget, self.nbytes
            assert self._pinned <= self._names.keys()

    def close(self) -> None:
        """Stop the worker."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _put(self, entry: KnownAdapter, state: ResidentAdapter) -> None:
        self._states[entry] = state
        old, self._names[entry.name] = self._names.get(entry.name), entry
        if old is not None:
            self._forget(old)

    def _start(
        self, entry: KnownAdapter, reserve: bool = False, naming: bool = False
    ) -> Future[None]:
        state = self._states[entry]
        state.reserved |= reserve and state.held is None
        if state.future is None and state.held is None:
            state.error = None
            state.future = self._worker.submit(self._work, entry, naming)
        done: Future[None] = Future()
        done.set_result(None)
        return state.future or done

    def _work(self, entry: KnownAdapter, naming: bool) -> None:
        """Read an adapter, and let its name stand for it, if that is what it is read for."""
        state = self._states[entry]
        try:
            held = self._read(entry)
            with self._lock:
                if self._make_room(held.nbytes):
                    state.hold(held, next(self._clock))
                    self.reads, self.seconds[entry.name] = self.reads + 1, held.seconds
                elif any(s.leases or s.reserved for s in self._states.values() if s.held):
                    self._blocked.add(entry)
                else:
                    raise LorafoldError(
                        f"adapter {entry.name!r}: found {held.nbytes:,} bytes, expected at most"
                        f" {self.budget:,} in all, with those that are pinned"
                    )
                old = self._names.get(entry.name)
                if naming and (old is None or old.generation < entry.generation):
                    self._put(entry, state)
        except Exception as error:
            known = isinstance(error, LorafoldError)
            told = error if known else LorafoldError(f"adapter {entry.name!r}: {error}")
            with self._lock:
                wanted = state.references and not naming
                state.error = told if wanted else None  # type: ignore[assignment]
            raise told from None
        finally:
            with self._lock:
                state.future = None
                (self.unbind if naming else self._forget)(entry)
            self._changed()

    def _make_room(self, nbytes: int) -> bool:
        """Let the least recently used adapters leave until there is room for so many bytes; False
        if there is none without all that may leave, and then none does.
        """
        left = 0 if self.budget is None else self.nbytes + nbytes - self.budget
        states = [(state, state.held) for e, state in self._states.items() if self._evictable(e)]
        free = [(state, held.nbytes) for state, held in states if held]
        if left > sum(n for _, n in free):
            return False
        for state, n in sorted(free, key=lambda one: one[0].used):
            if left > 0:
                state.held, left, self.evictions = None, left - n, self.evictions + 1
        return True

    def _evictable(self, entry: KnownAdapter) -> bool:
        state = self._states[entry]
        pinned = entry.name in self._pinned and self._names.get(entry.name) == entry
        pinned |= entry.path is None  # it could not be read again
        return state.held is not None and not (state.leases or state.reserved or pinned)

    def _forget(self, entry: KnownAdapter) -> None:
        """Drop an entry that no name stands for and nothing refers to."""
        state = self._states.get(entry)
        needed = self._names.get(entry.name) == entry
        if state and not (needed or state.references or state.future):
            del self._states[entry]


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
