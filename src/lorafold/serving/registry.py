"""Which names stand for which adapters.

    registry.sweep.begin()                      the directory's are verified, one after the other
    chosen = registry.choose(caller, "sql")     an adapter's version, verified by then, or the base

A name is the base, an adapter, `adapter@digest`, or an alias, whose requests go to its targets by
their weights. The backend knows every version under a name of its own, `adapter@digest`: other
files under the same name are another version, and requests that run finish with what they have.

What outlives the process (aliases, pins, quarantines and what was unloaded) is in one JSON file. It
is replaced in one step before a change is answered, so that what a caller was told holds after a
restart.

Digests are compared in today's form, and until lorafold 0.3 in the old one, which covers
configuration, weights, record and manifest but no tokenizer. A version without a manifest has no
old form of its own, so such a digest matches nothing; a quarantine holds.

`Sweep` verifies the directory's adapters while the server serves, and looks for new ones. A request
under an adapter that has not come to its turn yet verifies that one first.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from lorafold.errors import Busy, LorafoldError, cut, printable
from lorafold.files.atomic import write_text
from lorafold.peft.provenance import OwnBase
from lorafold.runtime.processor import alone
from lorafold.serving.backend import AdapterFiles, Backend
from lorafold.serving.directory import NAME, Directory
from lorafold.serving.errors import Refusal, wrong
from lorafold.serving.keys import Caller
from lorafold.serving.rendering import ServedModel
from lorafold.serving.settings import Strict, kept
from lorafold.serving.verifier import Verifier

V = TypeVar("V")
log = logging.getLogger(__name__)
STATE = ".lorafold-serve.json"  # beside the adapters, unless the settings name another
SIDE_BY_SIDE = 2  # adapters that are verified at a time
LOOK, SAVE = 1.0, 5.0  # seconds between two looks at the directory, and two writes
WARM = 16  # adapters that are read into memory before they are asked for
REASON = 2000  # characters of why an adapter is wrong
SHOWN = 12  # digits of a digest in a line of the log
WON_T = "which lorafold 0.3 won't understand"
MAY_BE = "or of another version without a tokenizer, so that it stands for nothing now"


class AliasTarget(Strict, strict=True):
    """Where a part of an alias's requests goes: an adapter, and its version if that matters."""

    adapter: str
    digest: str | None = Field(None, pattern=r"^[0-9a-f]{8,64}$")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)


class Alias(Strict):
    """What a name stands for, and what it stood for before."""

    targets: tuple[AliasTarget, ...] = Field(min_length=1, max_length=16)
    previous: tuple[AliasTarget, ...] = ()


class ServerState(Strict):
    """The content of the file. `digests` has the files that each adapter had when last seen,
    `quarantined` the digest and the reason, `base` the one that the adapters named when the server
    first started without the name of one.
    """

    aliases: dict[str, Alias] = Field({})
    pinned: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    quarantined: dict[str, tuple[str, str]] = Field({})
    digests: dict[str, str] = Field({})
    base: OwnBase | None = None


class Registry:
    """The names of one server. Any thread may call it."""

    def __init__(
        self,
        plain: ServedModel,
        directory: Directory,
        file: Path,
        verifier: Verifier,
        backend: Backend,
    ) -> None:
        self.plain, self.directory, self.file = plain, directory, file
        self.verifier, self._backend, self.kept = verifier, backend, kept(file, ServerState)
        self._told: set[str] = set()  # versions of which it was said that a digest is an old one
        self.created = int(time.time())
        self.found: dict[str, AdapterFiles] = {}
        self.wrong: dict[str, str] = {}
        self._marks: dict[str, object] = {}  # of the files of those that are wrong
        self.sweep = Sweep(self)
        self.lock = threading.RLock()
        self._turns: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    @property
    def base(self) -> str:
        """The base's name."""
        return self.plain.name

    def close(self) -> None:
        """Verify nothing more, and do not wait for what is being read."""
        self.sweep.closing.set()
        self.verifier.close()
        self.sweep.close()

    @property
    def listed(self) -> list[str]:
        """The names that are still to be verified."""
        return sorted(self.names() - self.found.keys() - self.wrong.keys())

    def unseen(self) -> list[str]:
        """The names that are still to be verified, or were wrong and have other files now."""
        for name, marks in [*self._marks.items()]:  # threads add to it meanwhile
            if name in self.wrong and self.directory.touch(name) != marks:
                self.wrong.pop(name, None)
        return self.listed

    def ready(self, name: str) -> AdapterFiles | None:
        """The adapter of a name, verified now if it was not before; None if there is none, or it is
        wrong. Raises Busy where the machine lacks what that needs: then it is as it was.
        """
        if name in self.wrong or name in self.kept.unloaded:
            return None
        if name in self.found:
            return self.found[name]
        if name not in self.directory.names():  # a name that a client made up leaves nothing here
            return None
        with self._turns[name]:
            if name in self.found or name in self.wrong:
                return self.found.get(name)
            marks = self.directory.touch(name)
            try:
                return self._take(self._verified(name))
            except LorafoldError as error:
                self._marks[name], self.wrong[name] = marks, printable(cut(str(error), REASON))
                log.warning("not served: %s: %s", printable(name), self.wrong[name])
                return None

    def choose(self, caller: Caller, model: str) -> ServedModel:
        """What a request for this model runs under."""
        if model == self.base and caller.base:
            return self.plain
        alias = self.kept.aliases.get(model) if caller.may(model) else None
        found: AdapterFiles | None
        if alias is None:
            found = self.version(caller, model)
        else:
            weights = [target.weight for target in alias.targets]
            target = random.choices(alias.targets, weights)[0]
            found = self.ready(target.adapter)
            if found is None or not self.fits(found, target.digest or ""):
                told = f"model: {model!r} stands for nothing now"
                raise Refusal(404, "model_not_found", told, "model")
        name = found.name
        if name in self.kept.quarantined:
            why = self.kept.quarantined[name][1]
            raise Refusal(423, "adapter_quarantined", f"{name} is in quarantine: {why}", "model")
        try:
            return ServedModel(name, found.key, self.verifier.renderer(found), self.plain.base)
        except LorafoldError as error:
            log.error("%s", error)
            told = f"{name} can't be read now; the server's log says why"
            raise Refusal(503, "adapter_unavailable", told, "model") from None

    def version(self, caller: Caller, model: str) -> AdapterFiles:
        """The adapter that NAME or NAME@DIGEST stands for."""
        name, at, digest = model.partition("@")
        found = self.ready(name) if caller.may(name) and NAME.fullmatch(name) else None
        if found is None or (at and len(digest) < 8) or not self.fits(found, digest):
            told = f"model: found no {model[:200]!r} that you may use"
            raise Refusal(404, "model_not_found", told, "model")
        return found

    def fits(self, found: AdapterFiles, given: str, unsure: bool = False) -> bool:
        """Whether a digest, or the first digits of one, is that of a version, in either form."""
        if found.digest.startswith(given):
            return True
        if not found.old.startswith(given):
            return False
        if found.key not in self._told:
            self._told.add(found.key)
            log.warning(
                "%s@%s is a digest of the old form, %s; use %s",
                found.name, given[:SHOWN], WON_T if found.manifest else MAY_BE, found.key,
            )  # fmt: skip
        return found.manifest or unsure

    def serves(self, chosen: ServedModel) -> bool:
        """Whether what was chosen is what its name stands for still."""
        found = self.found.get(chosen.name)
        return chosen.key is None or (found is not None and found.key == chosen.key)

    def load(self, name: str) -> AdapterFiles:
        """Read the files of an adapter, new or changed, and lift its quarantine."""
        with self._turns[name]:
            found = self._verified(name, afresh=True)
            with self.lock:
                if name in self.kept.quarantined:  # what was counted begins anew
                    self._backend.load(found, "known")
            self._backend.load(found, "resident")
            with self.lock:
                self._take(found, loaded=True)
                self.wrong.pop(name, None)
                unloaded = tuple(n for n in self.kept.unloaded if n != name)
                self.keep(unloaded=unloaded, quarantined=without(self.kept.quarantined, name))
            return found

    def unload(self, name: str) -> None:
        """Forget an adapter, until `load`. Requests that run finish with it."""
        self.known(name)
        with self.lock:
            found = self.served(name)
            self.keep(
                unloaded=(*self.kept.unloaded, name),
                pinned=tuple(n for n in self.kept.pinned if n != name),
            )
            del self.found[name]
            self._forget(found)

    def pin(self, name: str, pinned: bool) -> None:
        """Keep an adapter in memory, or no longer."""
        self.known(name)
        with self.lock:
            found = self.served(name)
            others = tuple(n for n in self.kept.pinned if n != name)
            self.keep(pinned=(*others, name) if pinned else others)
            self._backend.pin(found.key, pinned)
            if pinned:
                self._backend.load(found, "begun")

    def quarantine(self, name: str, why: str) -> None:
        """Refuse an adapter's requests, until `load`."""
        self.known(name)
        with self.lock:
            refused = self.kept.quarantined | {name: (self.served(name).digest, why)}
            try:
                self.keep(quarantined=refused)
            except LorafoldError as error:  # it holds at least until the server ends
                self.kept = self.kept.model_copy(update={"quarantined": refused})
                log.error("the quarantine of %s can't be kept: %s", name, error)

    def point(self, name: str, targets: tuple[AliasTarget, ...]) -> Alias:
        """Let an alias stand for these targets from the next request on."""
        for target in targets:
            self.known(target.adapter)
        with self.lock:
            if not NAME.fullmatch(name) or name in {self.base, *self.names()}:
                raise wrong("name", f"found {name[:80]!r}, expected one that no model has")
            for target in targets:
                found = self.served(target.adapter)
                if target.digest and not self.fits(found, target.digest):
                    told = f"found digest {target.digest}, expected {found.digest[:12]}"
                    raise wrong("targets", f"{target.adapter}: {told}")
            before = self.kept.aliases.get(name)
            alias = Alias(targets=targets, previous=before.targets if before else ())
            self.keep(aliases=self.kept.aliases | {name: alias})
            return alias

    def roll_back(self, name: str) -> Alias:
        """Let an alias stand for what it stood for before."""
        alias = self.alias(name)
        if not alias.previous:
            raise Refusal(409, "nothing_before", f"{name} has stood for nothing else before")
        return self.point(name, alias.previous)

    def drop_alias(self, name: str) -> None:
        """Forget an alias."""
        with self.lock:
            self.alias(name)
            self.keep(aliases=without(self.kept.aliases, name))

    def alias(self, name: str) -> Alias:
        """An alias."""
        if name not in self.kept.aliases:
            raise Refusal(404, "alias_not_found", f"found no alias {name[:80]!r}", "name")
        return self.kept.aliases[name]

    def known(self, name: str) -> None:
        """Verify an adapter that is to be changed. It may wait, so no lock is held meanwhile."""
        if NAME.fullmatch(name):
            self.ready(name)
        self.served(name)

    def served(self, name: str) -> AdapterFiles:
        """The adapter that is served under a name."""
        found = self.found.get(name)
        if found is None:
            raise Refusal(404, "adapter_not_found", f"found no adapter {name[:80]!r}", "adapter")
        return found

    def names(self) -> frozenset[str]:
        """The names of all adapters that were not unloaded."""
        return self.directory.names() - set(self.kept.unloaded)

    def _verified(self, name: str, afresh: bool = False) -> AdapterFiles:
        if name == self.base or name in self.kept.aliases:
            raise LorafoldError(f"found {name!r}, the name of the base or an alias")
        return self.verifier.find(name, afresh)

    def _take(self, found: AdapterFiles, loaded: bool = False) -> AdapterFiles:
        """Serve a version from now on, which may have been loaded, instead of the one before."""
        name = found.name
        with self.lock:
            before = self.found.get(name)
            if not loaded:
                self._backend.load(found, "known")
            pinned = name in self.kept.pinned
            self._backend.pin(found.key, pinned)
            if pinned or len(self.found) < WARM:
                self._backend.load(found, "begun")
            self.found[name] = found
            if before is not None and before.key != found.key:
                self._forget(before)
            held = self.kept.quarantined.get(name)
            # other files are another adapter
            if held is not None and not self.fits(found, held[0], unsure=True):
                with suppress(LorafoldError):
                    self.keep(quarantined=without(self.kept.quarantined, name))
        if self.verifier.seen.digests.get(name, found.digest) != found.digest:
            log.warning("%s has other files than before: %s", name, found.key)
        if found.note:
            log.warning("%s: %s", name, found.note)
        return found

    def _forget(self, found: AdapterFiles) -> None:
        with suppress(LorafoldError):
            self._backend.unload(found.key)

    def keep(self, **changes: object) -> None:
        """Change what is kept between runs."""
        now = self.kept.model_copy(update=changes)
        if now != self.kept:
            write_text(self.file, now.model_dump_json(indent=2) + "\n")
            self.kept = now


def without(some: Mapping[str, V], name: str) -> dict[str, V]:
    """All but the one of that name."""
    return {n: one for n, one in some.items() if n != name}


class Sweep:
    """A thread that looks what there is to verify, again and again, and those that verify it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.closing, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        self._pool = ThreadPoolExecutor(SIDE_BY_SIDE, "lorafold-verifying", initializer=alone)
        self._thread = threading.Thread(None, self._run, "lorafold-sweep", daemon=True)

    def begin(self) -> None:
        """Begin with what there is now."""
        self._idle.clear()
        self._thread.start()

    def settled(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to verify; False if that takes longer than so many seconds."""
        return self._idle.wait(timeout)

    def close(self) -> None:
        """End the threads, after what they do now."""
        self.closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        saved = time.monotonic()
        while not self.closing.is_set():
            begun, names = time.monotonic(), list[str]()
            try:
                names = sorted(self._registry.unseen())
            except Exception:
                log.exception("the directory can't be read")
            if names:
                self._idle.clear()
            if n := sum(self._pool.map(self._verified, names)):
                log.info("%d adapters looked at in %.1f s", n, time.monotonic() - begun)
            self._idle.set()
            if n or time.monotonic() - saved > SAVE:
                saved = time.monotonic()
                try:
                    self._registry.verifier.seen.save()
                except Exception:
                    log.exception("what was verified can't be kept")
            self.closing.wait(LOOK)

    def _verified(self, name: str) -> bool:
        """Verify an adapter, and return whether that was possible now."""
        try:
            if self.closing.is_set():
                return False
            self._registry.ready(name)
            return True
        except Busy as error:
            log.warning("%s", error)
        except Exception:
            log.exception("%s can't be verified", name)
        return False
