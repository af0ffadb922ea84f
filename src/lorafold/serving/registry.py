"""Names of models: the base, an adapter, `adapter@digest`, or an alias with weighted targets.

The backend knows versions as `adapter@digest`, so running requests keep their version. Aliases,
pins, quarantines and unloaded adapters are stored in a JSON file, which is written before a change
is confirmed. Until lorafold 0.3, digests in the old format, without the tokenizer, match too.
Without a manifest, they are ambiguous and match only for a quarantine.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from lorafold.errors import Busy, LorafoldError, escape_unprintable, truncate
from lorafold.files.atomic import write_text
from lorafold.peft.provenance import RecordedBase
from lorafold.runtime.processor import use_one_thread
from lorafold.serving.backend import AdapterFiles, Backend
from lorafold.serving.directory import NAME, Directory
from lorafold.serving.keys import Caller
from lorafold.serving.refusals import Refusal, invalid
from lorafold.serving.rendering import ServedModel
from lorafold.serving.settings import Strict, read_if_exists
from lorafold.serving.verifier import Verifier

V = TypeVar("V")
log = logging.getLogger(__name__)
STATE_FILE = ".lorafold-serve.json"  # by default next to the adapters
SCAN_INTERVAL, SAVE_INTERVAL = 1.0, 5.0  # seconds
NUM_PRELOADED = 16  # adapters that are loaded before they are requested
MAX_REASON = 2000  # characters of the reason for a rejection


class AliasTarget(Strict, strict=True):
    adapter: str
    digest: str | None = Field(None, pattern=r"^[0-9a-f]{8,64}$")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)


class Alias(Strict):
    targets: tuple[AliasTarget, ...] = Field(min_length=1, max_length=16)
    previous: tuple[AliasTarget, ...] = ()


class ServerState(Strict):
    aliases: dict[str, Alias] = Field({})
    pinned: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    quarantined: dict[str, tuple[str, str]] = Field({})  # (digest, reason)
    digests: dict[str, str] = Field({})  # latest digest by adapter
    base: RecordedBase | None = None  # the base that a start without `--model` derived


class Registry:
    """The models of one server. Thread-safe."""

    def __init__(
        self,
        base_model: ServedModel,
        directory: Directory,
        file: Path,
        verifier: Verifier,
        backend: Backend,
    ) -> None:
        self.base_model, self.base = base_model, base_model.name
        self.directory, self.file, self.verifier = directory, file, verifier
        self._backend = backend
        self.state = read_if_exists(file, ServerState)
        self._warned: set[str] = set()  # versions that were requested by a digest in the old format
        self.created = int(time.time())
        self.adapters: dict[str, AdapterFiles] = {}
        self.rejected: dict[str, str] = {}  # reasons
        self._rejected_stamps: dict[str, object] = {}  # stamps of rejected adapters' files
        self.watcher = DirectoryWatcher(self)
        self.lock = threading.RLock()
        self._name_locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    def close(self) -> None:
        """Stops verification, without waiting for files that are being read."""
        self.watcher.closing.set()
        self.verifier.close()
        self.watcher.close()

    @property
    def unverified(self) -> list[str]:
        return sorted(self.names() - self.adapters.keys() - self.rejected.keys())

    def to_verify(self) -> list[str]:
        for name, stamps in [*self._rejected_stamps.items()]:  # a copy, because threads add to it
            if name in self.rejected and self.directory.stamps_or_none(name) != stamps:
                self.rejected.pop(name, None)
        return self.unverified

    def find(self, name: str) -> AdapterFiles | None:
        """Returns an adapter, after verifying it if necessary, or None if it doesn't exist, was
        unloaded or was rejected. Raises Busy if resources are exhausted.
        """
        if name in self.rejected or name in self.state.unloaded:
            return None
        if name in self.adapters:
            return self.adapters[name]
        if name not in self.directory.names():  # a client's invented names must not create locks
            return None
        with self._name_locks[name]:
            if name in self.adapters or name in self.rejected:
                return self.adapters.get(name)
            stamps = self.directory.stamps_or_none(name)
            try:
                return self._serve(self._verify(name))
            except LorafoldError as error:
                why = escape_unprintable(truncate(str(error), MAX_REASON))
                self._rejected_stamps[name], self.rejected[name] = stamps, why
                log.warning("adapter %s is not served: %s", escape_unprintable(name), why)
                return None

    def choose(self, caller: Caller, model: str) -> ServedModel:
        """Returns a model for a caller. The error is the same for missing and for forbidden models,
        so that it doesn't disclose names.
        """
        if model == self.base and caller.base:
            return self.base_model
        alias = self.state.aliases.get(model) if caller.may_use(model) else None
        adapter: AdapterFiles | None
        if alias is None:
            adapter = self.find_version(caller, model)
        else:
            weights = [target.weight for target in alias.targets]
            target = random.choices(alias.targets, weights)[0]
            adapter = self.find(target.adapter)
            if adapter is None or not self.matches(adapter, target.digest or ""):
                message = f"model: the adapter of alias {model!r} is not served or has changed"
                raise Refusal(404, "model_not_found", message, "model")
        name = adapter.name
        if name in self.state.quarantined:
            why = self.state.quarantined[name][1]
            raise Refusal(423, "adapter_quarantined", f"{name} is in quarantine: {why}", "model")
        try:
            renderer = self.verifier.renderer(adapter)
            return ServedModel(name, adapter.key, renderer, self.base_model.base)
        except LorafoldError as error:
            log.error("%s", error)
            message = f"{name} can't be loaded; see the server's log"
            raise Refusal(503, "adapter_unavailable", message, "model") from None

    def find_version(self, caller: Caller, model: str) -> AdapterFiles:
        name, at, digest = model.partition("@")
        adapter = self.find(name) if caller.may_use(name) and NAME.fullmatch(name) else None
        if adapter is None or (at and len(digest) < 8) or not self.matches(adapter, digest):
            message = f"model: {model[:200]!r} is not served, or your key may not use it"
            raise Refusal(404, "model_not_found", message, "model")
        return adapter

    def matches(self, adapter: AdapterFiles, digits: str, allow_ambiguous: bool = False) -> bool:
        """Whether `digits` is a digest of the adapter, or a prefix of one."""
        if adapter.digest.startswith(digits):
            return True
        if not adapter.old.startswith(digits):
            return False
        if adapter.key not in self._warned:
            self._warned.add(adapter.key)
            why = "is ambiguous without a manifest and therefore selects no version"
            if adapter.manifest:
                why = "lorafold 0.3 will no longer support"
            log.warning(
                "%s@%s is a digest in the old format, which %s; use %s",
                adapter.name, digits[:12], why, adapter.key,
            )  # fmt: skip
        return adapter.manifest or allow_ambiguous

    def is_current(self, chosen: ServedModel) -> bool:
        adapter = self.adapters.get(chosen.name)
        return chosen.key is None or (adapter is not None and adapter.key == chosen.key)

    def load(self, name: str) -> AdapterFiles:
        """Loads a new or changed adapter and ends its quarantine. If it can't be loaded, the
        previous version stays in use.
        """
        with self._name_locks[name]:
            adapter = self._verify(name, afresh=True)
            with self.lock:
                if name in self.state.quarantined:  # resets its strikes
                    self._backend.load(adapter, "known")
            self._backend.load(adapter, "resident")
            with self.lock:
                self._serve(adapter, loaded=True)
                self.rejected.pop(name, None)
                self.save(
                    unloaded=tuple(n for n in self.state.unloaded if n != name),
                    quarantined=without(self.state.quarantined, name),
                )
            return adapter

    def unload(self, name: str) -> None:
        with self._lock_adapters(name) as [adapter]:
            self.save(
                unloaded=(*self.state.unloaded, name),
                pinned=tuple(n for n in self.state.pinned if n != name),
            )
            del self.adapters[name]
            self._forget(adapter)

    def pin(self, name: str, pinned: bool) -> None:
        with self._lock_adapters(name) as [adapter]:
            others = tuple(n for n in self.state.pinned if n != name)
            self.save(pinned=(*others, name) if pinned else others)
            self._backend.pin(adapter.key, pinned)
            if pinned:
                self._backend.load(adapter, "begun")

    def quarantine(self, name: str, why: str) -> None:
        with self._lock_adapters(name) as [adapter]:
            quarantined = self.state.quarantined | {name: (adapter.digest, why)}
            try:
                self.save(quarantined=quarantined)
            except LorafoldError as error:  # it is kept in memory at least
                self.state = self.state.model_copy(update={"quarantined": quarantined})
                log.error("the quarantine of %s can't be saved: %s", name, error)

    def set_alias(self, name: str, targets: tuple[AliasTarget, ...]) -> Alias:
        with self._lock_adapters(*(target.adapter for target in targets)) as adapters:
            if not NAME.fullmatch(name) or name in {self.base, *self.names()}:
                raise invalid("name", f"found {name[:80]!r}, expected a valid name no model has")
            for target, adapter in zip(targets, adapters, strict=True):
                if target.digest and not self.matches(adapter, target.digest):
                    message = f"found digest {target.digest}, expected {adapter.digest[:12]}"
                    raise invalid("targets", f"{target.adapter}: {message}")
            before = self.state.aliases.get(name)
            alias = Alias(targets=targets, previous=before.targets if before else ())
            self.save(aliases=self.state.aliases | {name: alias})
            return alias

    def roll_back(self, name: str) -> Alias:
        alias = self.get_alias(name)
        if not alias.previous:
            raise Refusal(409, "nothing_before", f"{name} has no earlier targets to restore")
        return self.set_alias(name, alias.previous)

    def delete_alias(self, name: str) -> None:
        with self.lock:
            self.get_alias(name)
            self.save(aliases=without(self.state.aliases, name))

    def get_alias(self, name: str) -> Alias:
        if name not in self.state.aliases:
            raise Refusal(404, "alias_not_found", f"alias {name[:80]!r} does not exist", "name")
        return self.state.aliases[name]

    @contextmanager
    def _lock_adapters(self, *names: str) -> Iterator[list[AdapterFiles]]:
        for name in filter(NAME.fullmatch, names):
            self.find(name)
        with self.lock:
            for name in names:
                if name not in self.adapters:
                    message = f"adapter {name[:80]!r} does not exist or is not served"
                    raise Refusal(404, "adapter_not_found", message, "adapter")
            yield [self.adapters[name] for name in names]

    def names(self) -> frozenset[str]:
        return self.directory.names() - set(self.state.unloaded)

    def _verify(self, name: str, afresh: bool = False) -> AdapterFiles:
        if name == self.base or name in self.state.aliases:
            raise LorafoldError(f"the base or an alias has the name {name!r} too; rename one")
        return self.verifier.find(name, afresh)

    def _serve(self, adapter: AdapterFiles, loaded: bool = False) -> AdapterFiles:
        name = adapter.name
        with self.lock:
            before = self.adapters.get(name)
            if not loaded:
                self._backend.load(adapter, "known")
            pinned = name in self.state.pinned
            self._backend.pin(adapter.key, pinned)
            if pinned or len(self.adapters) < NUM_PRELOADED:
                self._backend.load(adapter, "begun")
            self.adapters[name] = adapter
            if before is not None and before.key != adapter.key:
                self._forget(before)
            quarantined = self.state.quarantined.get(name)
            # a quarantine ends when the files change
            if quarantined and not self.matches(adapter, quarantined[0], allow_ambiguous=True):
                with suppress(LorafoldError):
                    self.save(quarantined=without(self.state.quarantined, name))
        if self.verifier.cache.digests.get(name, adapter.digest) != adapter.digest:
            log.warning("the files of %s have changed; its version is now %s", name, adapter.key)
        if adapter.note:
            log.warning("%s: %s", name, adapter.note)
        return adapter

    def _forget(self, adapter: AdapterFiles) -> None:
        with suppress(LorafoldError):
            self._backend.unload(adapter.key)

    def save(self, **changes: object) -> None:
        state = self.state.model_copy(update=changes)
        if state != self.state:
            write_text(self.file, state.model_dump_json(indent=2) + "\n")
            self.state = state


def without(entries: Mapping[str, V], name: str) -> dict[str, V]:
    return {key: value for key, value in entries.items() if key != name}


class DirectoryWatcher:
    """Verifies the adapters of the directory in the background and polls for new adapters. A
    request for an unverified adapter verifies it first.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.closing, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        self._pool = ThreadPoolExecutor(2, "lorafold-verifying", initializer=use_one_thread)
        self._thread = threading.Thread(None, self._run, "lorafold-watcher", daemon=True)

    def begin(self) -> None:
        self._idle.clear()
        self._thread.start()

    def settled(self, timeout: float | None = None) -> bool:
        """Waits until all adapters are verified. Returns False if `timeout` seconds pass first."""
        return self._idle.wait(timeout)

    def close(self) -> None:
        self.closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        saved = time.monotonic()
        while not self.closing.is_set():
            begun, names = time.monotonic(), list[str]()
            try:
                names = self._registry.to_verify()
            except Exception:
                log.exception("the directory of adapters can't be read")
            if names:
                self._idle.clear()
            if n := sum(self._pool.map(self._verify, names)):
                log.info("adapters checked: %d in %.1f s", n, time.monotonic() - begun)
            self._idle.set()
            if n or time.monotonic() - saved > SAVE_INTERVAL:
                saved = time.monotonic()
                try:
                    self._registry.verifier.cache.save()
                except Exception:
                    log.exception("the cache of verified adapters can't be saved")
            self.closing.wait(SCAN_INTERVAL)

    def _verify(self, name: str) -> bool:
        try:
            if self.closing.is_set():
                return False
            self._registry.find(name)
            return True
        except Busy as error:
            log.warning("%s", error)
        except Exception:
            log.exception("%s can't be verified", name)
        return False
