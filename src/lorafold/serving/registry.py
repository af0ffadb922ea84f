"""Which names stand for which adapters.

    registry.open(engine)                       what is wrong, by name; the rest is known
    chosen = registry.choose(caller, "sql")     an adapter's version, or the base

A name is the base, an adapter, `adapter@digest`, or an alias, whose requests go to its targets by
their weights. The engine knows every version under a name of its own, `adapter@digest`: other files
under the same name are another version, and requests that run finish with what they have.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorafold.engine import Engine
from lorafold.errors import LorafoldError, cut
from lorafold.serving.directory import NAME, Directory, Found
from lorafold.serving.kept import Alias, Kept, Target, read_kept, write_kept
from lorafold.serving.keys import Caller
from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.renderers import Renderers
from lorafold.serving.rendering import Renderer

log = logging.getLogger(__name__)
REASON = 2000  # characters of why an adapter is wrong


@dataclass(frozen=True)
class Chosen:
    """What a request runs under: the adapter's name, or the base's, its version in the engine, None
    for the base, and what renders it.
    """

    name: str
    key: str | None
    renderer: Renderer


class Registry:
    """The names of one server. Any thread may call it.

    Args:
        base: the base's name.
        directory: the adapters.
        file: what is kept between runs.
        renderers: those of the base and of adapters with a tokenizer of their own.
    """

    def __init__(
        self, base: str, directory: Directory, file: Path, renderers: Renderers
    ) -> None:
        self.base, self.directory, self.file = base, directory, file
        self.renderers, self._own = renderers, dict[str, Renderer]()
        self.kept: Kept = read_kept(file)
        self.created = int(time.time())
        self.found: dict[str, Found] = {}
        self.wrong: dict[str, str] = {}
        self._lock = threading.RLock()
        self._engine: Engine | None = None
        self._resident: set[str] = set()

    def open(self, engine: Engine, progress: Callable[[str], None] = lambda name: None) -> None:
        """Verify every adapter and make it known to the engine.

        Args:
            engine: the engine.
            progress: called with each name.
        """
        self._engine = engine
        for name in self.directory.names():
            progress(name)
            if name in self.kept.unloaded:
                continue
            try:
                self._load(name)
            except LorafoldError as error:
                self.wrong[name] = cut(str(error), REASON)
        for name, found in self.found.items():
            before = self.kept.digests.get(name, found.digest)
            if before != found.digest:
                log.warning("%s has other files than before: %s", name, found.key)
        refused = {
            name: told
            for name, told in self.kept.quarantined.items()
            if name not in self.found or self.found[name].digest == told[0]
        }  # other files are another adapter
        digests = {name: found.digest for name, found in self.found.items()}
        try:
            self._keep(quarantined=refused, digests=digests)
        except LorafoldError as error:
            log.warning("aliases and pins can't be kept: %s", error)

    def reopen(self, engine: Engine) -> None:
        """Make what was known to an engine that ended known to a new one; what was in memory is
        read again.
        """
        with self._lock:
            self._engine = engine
            for found in self.found.values():
                engine.adapters.know(found.key, found.path, found.digest)
                engine.adapters.pin(found.key, found.name in self.kept.pinned)
                if found.key in self._resident:
                    engine.load(found.key, found.path, wait=False)

    def remember(self) -> None:
        """Note which adapters are in memory, for `reopen`."""
        states = self.engine.adapters
        with suppress(LorafoldError):
            keys = [found.key for found in list(self.found.values())]
            self._resident = {k for k in keys if states.status(k) in ("resident", "loading")}

    @property
    def engine(self) -> Engine:
        """The engine that computes now."""
        assert self._engine is not None
        return self._engine

    def choose(self, caller: Caller, model: str) -> Chosen:
        """What a request for this model runs under. Raises Refusal for one that does not exist, or
        that the caller may not use: the answer is the same, so that nobody learns a name.
        """
        if model == self.base and caller.base:
            return Chosen(self.base, None, self.renderers.base)
        alias = self.kept.aliases.get(model) if caller.may(model) else None
        if alias is None:
            found = self.version(caller, model)
        else:
            weights = [target.weight for target in alias.targets]
            target = random.choices(alias.targets, weights)[0]
            pointed = self.found.get(target.adapter)
            if pointed is None or not pointed.digest.startswith(target.digest or ""):
                told = f"model: {model!r} stands for nothing now"
                raise Refusal(404, "model_not_found", told, "model")
            found = pointed
        name = found.name
        if name in self.kept.quarantined:
            why = self.kept.quarantined[name][1]
            raise Refusal(423, "adapter_quarantined", f"{name} is in quarantine: {why}", "model")
        return Chosen(name, found.key, self._own.get(found.key, self.renderers.base))

    def version(self, caller: Caller, model: str) -> Found:
        """The adapter that NAME or NAME@DIGEST stands for. Raises Refusal as `choose` does."""
        name, at, digest = model.partition("@")
        found = self.found.get(name) if caller.may(name) else None
        if found is None or (at and len(digest) < 8) or not found.digest.startswith(digest):
            told = f"model: found no {model[:200]!r} that you may use"
            raise Refusal(404, "model_not_found", told, "model")
        return found

    def load(self, name: str) -> Found:
        """Read the files of an adapter, new or changed, and lift its quarantine. Raises
        LorafoldError if they are wrong; then everything is as it was.
        """
        with self._lock:
            found = self._load(name)
            self.wrong.pop(name, None)
            self._keep(
                unloaded=tuple(n for n in self.kept.unloaded if n != name),
                quarantined={n: q for n, q in self.kept.quarantined.items() if n != name},
                digests=self.kept.digests | {name: found.digest},
            )
            return found

    def unload(self, name: str) -> None:
        """Forget an adapter, until `load`. Requests that run finish with it."""
        with self._lock:
            found = self._known(name)
            self._keep(
                unloaded=(*self.kept.unloaded, name),
                pinned=tuple(n for n in self.kept.pinned if n != name),
            )
            del self.found[name]
            self._forget(found)

    def pin(self, name: str, pinned: bool) -> None:
        """Keep an adapter in memory, or no longer."""
        with self._lock:
            found = self._known(name)
            others = tuple(n for n in self.kept.pinned if n != name)
            self._keep(pinned=(*others, name) if pinned else others)
            self.engine.adapters.pin(found.key, pinned)
            if pinned:
                self.engine.load(found.key, found.path, wait=False)

    def quarantine(self, name: str, why: str) -> None:
        """Refuse an adapter's requests, until `load`."""
        with self._lock:
            refused = self.kept.quarantined | {name: (self._known(name).digest, why)}
            kept = self.kept
            try:
                self._keep(quarantined=refused)
            except LorafoldError as error:  # it holds at least until the server ends
                self.kept = kept.model_copy(update={"quarantined": refused})
                log.error("the quarantine of %s can't be kept: %s", name, error)

    def point(self, name: str, targets: tuple[Target, ...]) -> Alias:
        """Let an alias stand for these targets from the next request on."""
        with self._lock:
            if not NAME.fullmatch(name) or name == self.base or name in self.found:
                raise wrong("name", f"found {name[:80]!r}, expected one that no model has")
            for target in targets:
                found = self._known(target.adapter)
                if target.digest and not found.digest.startswith(target.digest):
                    told = f"found digest {target.digest}, expected {found.digest[:12]}"
                    raise wrong("targets", f"{target.adapter}: {told}")
            before = self.kept.aliases.get(name)
            alias = Alias(targets=targets, previous=before.targets if before else ())
            self._keep(aliases=self.kept.aliases | {name: alias})
            return alias

    def roll_back(self, name: str) -> Alias:
        """Let an alias stand for what it stood for before."""
        with self._lock:
            alias = self.alias(name)
            if not alias.previous:
                raise Refusal(409, "nothing_before", f"{name} has stood for nothing else before")
            return self.point(name, alias.previous)

    def drop(self, name: str) -> None:
        """Forget an alias."""
        with self._lock:
            self.alias(name)
            self._keep(aliases={n: a for n, a in self.kept.aliases.items() if n != name})

    def alias(self, name: str) -> Alias:
        """An alias. Raises Refusal for an unknown one."""
        if name not in self.kept.aliases:
            raise Refusal(404, "alias_not_found", f"found no alias {name[:80]!r}", "name")
        return self.kept.aliases[name]

    def _known(self, name: str) -> Found:
        if name not in self.found:
            raise Refusal(404, "adapter_not_found", f"found no adapter {name[:80]!r}", "adapter")
        return self.found[name]

    def _load(self, name: str) -> Found:
        if name == self.base or name in self.kept.aliases:
            raise LorafoldError(f"found {name!r}, the name of the base or an alias")
        found, before = self.directory.find(name), self.found.get(name)
        files = self.directory.tokenizer(name)
        own = None if files is None else self.renderers.of(files)
        if name in self.kept.quarantined:  # what the engine counted begins anew
            self.engine.adapters.know(found.key, found.path, found.digest)
        self.engine.load(found.key, found.path)
        self.engine.adapters.pin(found.key, name in self.kept.pinned)
        if own is None:
            self._own.pop(found.key, None)
        else:
            self._own[found.key] = own
        self.found[name] = found
        if before is not None and before.key != found.key:
            self._forget(before)
        return found

    def _forget(self, found: Found) -> None:
        self._own.pop(found.key, None)
        with suppress(LorafoldError):
            self.engine.unload(found.key)

    def _keep(self, **changes: object) -> None:
        kept = self.kept.model_copy(update=changes)
        if kept != self.kept:
            write_kept(self.file, kept)
            self.kept = kept
