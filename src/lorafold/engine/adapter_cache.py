"""Loading and eviction of an engine's adapters.

Loading other files under an existing name creates a new entry; earlier requests keep their entry.
An entry counts a reference per waiting or running request, and a lease per running request. If
memory is limited, the least recently used adapters without a lease, pin or reservation are evicted.

A checksum detects changes in memory. It is the sum of all bytes as 64-bit integers, which is faster
than CRC-32 and changes with any single bit flip.
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

from lorafold.engine.adapters import KnownAdapter, LoadedAdapter, Reader, VerifiedAdapter
from lorafold.errors import LorafoldError, listed
from lorafold.runtime.processor import use_one_thread

AdapterStatus = Literal["cold", "loading", "resident", "quarantined"]


class AdapterCache:
    """Holds adapters of at most `budget` bytes. It calls `on_change`, also from its worker thread,
    when waiting requests may be able to run. Thread-safe.
    """

    def __init__(
        self,
        reader: Reader,
        budget: int | None = None,
        on_change: Callable[[], None] = lambda: None,
        strikes: int = 3,
    ) -> None:
        self._reader = reader
        self.budget, self._on_change, self.strikes = budget, on_change, strikes
        self.reads = self.evictions = self.damaged = 0
        self.seconds: dict[str, float] = {}  # duration of the last load, by name
        self._lock = threading.RLock()
        self._by_name: dict[str, KnownAdapter] = {}
        self._entries: set[KnownAdapter] = set()
        self.generations = {0}  # of the base, and of adapters that have a name or requests
        # entries that did not fit into memory; cleared when an adapter may have become evictable
        self._without_room: set[KnownAdapter] = set()
        self._worker = ThreadPoolExecutor(1, "lorafold-adapters", initializer=use_one_thread)
        self._clock, self._generations = itertools.count(1), itertools.count(1)

    def load(
        self, name: str, path: str | Path, stack: Sequence[VerifiedAdapter] = ()
    ) -> Future[None]:
        """Reads an adapter and registers it under a name. If this fails, the future raises and the
        name keeps its adapter. `stack` contains the expected digests of the files; if it is empty,
        the current files are accepted.
        """
        if not name:
            raise LorafoldError("adapter name: found '', expected at least one character")
        verified = tuple(stack) or self._reader.verified(path)
        with self._lock:
            known = self._by_name.get(name)
            if known is not None and (known.path, known.stack) == (Path(path), verified):
                return self._start(known)
            entry = KnownAdapter(name, Path(path), verified, next(self._generations))
            entry.references = 1  # until `_set_name`
            self._entries.add(entry)
            self.generations.add(entry.generation)
            return self._start(entry, set_name=True)

    def register(self, name: str, path: str | Path, stack: Sequence[VerifiedAdapter]) -> None:
        with self._lock:
            self._set_name(KnownAdapter(name, Path(path), tuple(stack), next(self._generations)))

    def adopt(self, name: str, make: Callable[[str], LoadedAdapter]) -> None:
        """Registers an adapter without files, which is never evicted."""
        with self._lock:
            entry = KnownAdapter(name, None, (), next(self._generations))
            self._set_loaded(entry, make(entry.key))
            self._set_name(entry)

    def unload(self, name: str) -> None:
        """Removes a name. Requests that use its adapter continue."""
        with self._lock:
            entry = self.entry(name)
            del self._by_name[name]
            entry.pinned = False
            self.seconds.pop(name, None)
            self._forget(entry)

    def pin(self, name: str, pinned: bool = True) -> None:
        with self._lock:
            self.entry(name).pinned = pinned
            self._without_room.clear()

    def entry(self, name: str) -> KnownAdapter:
        with self._lock:
            if name not in self._by_name:
                known = listed(sorted(self._by_name)) or "none"
                raise LorafoldError(
                    f"adapter: found {name!r}, expected one of the loaded adapters: {known}"
                )
            return self._by_name[name]

    def bind(self, name: str) -> KnownAdapter:
        with self._lock:
            entry = self.entry(name)
            self._check_strikes(entry)
            entry.references += 1
            return entry

    def unbind(self, entry: KnownAdapter) -> None:
        with self._lock:
            entry.references -= 1
            if not entry.references:
                entry.reserved = False
                self._without_room.clear()
                self._forget(entry)

    def lease(self, entry: KnownAdapter) -> LoadedAdapter | None:
        """Returns the adapter and keeps it in memory until `release`, or None while it loads."""
        with self._lock:
            self._check_strikes(entry)
            if entry.error is not None:
                error, entry.error = entry.error, None
                raise error
            if entry.loaded is None:
                if entry not in self._without_room:
                    self._start(entry, reserve=True)
                return None
            entry.leases, entry.reserved, entry.used = entry.leases + 1, False, next(self._clock)
            return entry.loaded

    def release(self, entry: KnownAdapter) -> None:
        with self._lock:
            entry.leases -= 1
            self._without_room.clear()
        self._on_change()

    def check_memory(self) -> None:
        """Compares the checksum of the idle adapter that was checked least recently, and evicts it
        if its memory changed.
        """
        with self._lock:
            # an adopted adapter has no file to read again
            read = [e for e in self._entries if e.loaded and e.path]
            if idle := [e for e in read if not (e.leases or e.reserved)]:
                entry = min(idle, key=lambda e: e.checked)
                entry.checked = next(self._clock)
                if entry.loaded and checksum(entry.loaded) != entry.checksum:
                    entry.loaded, self.damaged = None, self.damaged + 1

    def statuses(self) -> dict[str, tuple[AdapterStatus, int]]:
        """Returns (status, bytes) by name. Cold adapters are omitted unless they have strikes."""
        statuses: dict[str, tuple[AdapterStatus, int]] = {}
        with self._lock:
            for name, e in self._by_name.items():
                if e.loaded or e.future or e.strikes:
                    status: AdapterStatus = "loading" if e.future else "cold"
                    status = "resident" if e.loaded else status
                    status = "quarantined" if e.strikes >= self.strikes else status
                    statuses[name] = status, e.loaded.nbytes if e.loaded else 0
        return statuses

    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    @property
    def nbytes(self) -> int:
        """The bytes of adapters in memory that were read from files."""
        with self._lock:
            return sum(e.loaded.nbytes for e in self._entries if e.loaded and e.path)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _check_strikes(self, entry: KnownAdapter) -> None:
        if entry.strikes >= self.strikes:
            raise LorafoldError(
                f"adapter {entry.name!r}: in quarantine, because {entry.strikes} requests had NaN"
                " or infinite logits; load other files under this name"
            )

    def _set_loaded(self, entry: KnownAdapter, loaded: LoadedAdapter) -> None:
        entry.loaded, entry.checksum = loaded, checksum(loaded)
        entry.used = entry.checked = next(self._clock)
        entry.vocabulary = loaded.vocabulary or 0

    def _set_name(self, entry: KnownAdapter) -> None:
        self._entries.add(entry)
        self.generations.add(entry.generation)
        old, self._by_name[entry.name] = self._by_name.get(entry.name), entry
        if old is not None:
            entry.pinned, old.pinned = old.pinned, False
            self._forget(old)

    def _start(
        self, entry: KnownAdapter, reserve: bool = False, set_name: bool = False
    ) -> Future[None]:
        if entry.loaded is not None:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        entry.reserved |= reserve
        if entry.future is None:
            entry.error = None
            entry.future = self._worker.submit(self._load_in_worker, entry, set_name)
        return entry.future

    def _load_in_worker(self, entry: KnownAdapter, set_name: bool) -> None:
        try:
            loaded = self._reader.read(entry)
            with self._lock:
                if self._make_room(loaded.nbytes):
                    self._set_loaded(entry, loaded)
                    self.reads, self.seconds[entry.name] = self.reads + 1, loaded.seconds
                elif any(e.leases or e.reserved for e in self._entries if e.loaded):
                    self._without_room.add(entry)
                else:
                    raise LorafoldError(
                        f"adapter {entry.name!r}: its {loaded.nbytes:,} bytes and those of pinned"
                        f" adapters exceed adapter_bytes, {self.budget:,}; unpin one or raise it"
                    )
                old = self._by_name.get(entry.name)
                if set_name and (old is None or old.generation < entry.generation):
                    self._set_name(entry)
        except Exception as error:
            if not isinstance(error, LorafoldError):
                error = LorafoldError(f"adapter {entry.name!r}: {error}")
            with self._lock:
                entry.error = error if entry.references and not set_name else None
            raise error from None
        finally:
            with self._lock:
                entry.future = None
                (self.unbind if set_name else self._forget)(entry)
            self._on_change()

    def _make_room(self, nbytes: int) -> bool:
        """Evicts the least recently used adapters, or none if that would not free enough memory."""
        excess = 0 if self.budget is None else self.nbytes + nbytes - self.budget
        evictable = [entry for entry in self._entries if self._evictable(entry)]
        sizes = [(entry, entry.loaded.nbytes) for entry in evictable if entry.loaded]
        if excess > sum(n for _, n in sizes):
            return False
        for entry, n in sorted(sizes, key=lambda size: size[0].used):
            if excess > 0:
                entry.loaded, excess, self.evictions = None, excess - n, self.evictions + 1
        return True

    def _evictable(self, entry: KnownAdapter) -> bool:
        # an adopted adapter has no path to read it from again
        needed = entry.leases or entry.reserved or entry.pinned or entry.path is None
        return entry.loaded is not None and not needed

    def _forget(self, entry: KnownAdapter) -> None:
        if not (self._by_name.get(entry.name) is entry or entry.references or entry.future):
            self._entries.discard(entry)
            self.generations.discard(entry.generation)


def checksum(loaded: LoadedAdapter) -> int:
    total = 0
    for tensor in {t.untyped_storage().data_ptr(): t for t in loaded.tensors}.values():
        content = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        content = content.set_(tensor.detach().untyped_storage())
        whole = len(content) // 8 * 8
        # numpy, because torch would wake its threads, which then spin for longer than the sum takes
        values = content.cpu().numpy()
        total += int(values[:whole].view(np.int64).sum()) + int(values[whole:].sum())
    return total
