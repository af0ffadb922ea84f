"""Models: the list of them, one of them, what changes of them, as server-sent events, and the
administration of adapters and aliases.

    async for data in feed.events(caller, admin):     the whole list, then what changed since

A `Look` copies what is known of all adapters, and two are compared, so only models that changed are
described again. The feed looks once a second, for all who listen. Callers that may see the same
models share a view, for which an event is written once. A listener that does not take events as
fast as they come gets the whole list again instead of those between.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.errors import STOPS, LorafoldError, cut
from lorafold.serving.backend import AdapterFiles
from lorafold.serving.errors import Refusal, wrong
from lorafold.serving.keys import ADMIN, Caller
from lorafold.serving.metrics import state_of
from lorafold.serving.registry import REASON, AliasTarget, Registry
from lorafold.serving.request_body import Body, event
from lorafold.serving.server import Server, answer, authorization, record_of

K = TypeVar("K")
T = TypeVar("T")
log = logging.getLogger(__name__)
EACH = 1.0  # seconds between two looks
ACTS = ("pin", "unpin", "quarantine")
OURS = ""  # the name of no tenant, as which the feed thinks


def routes(app: FastAPI, server: Server) -> None:
    """Add them."""
    feed, registry = ModelChanges(server), server.registry
    held = defaultdict[str, set[str]](set)  # the streams that are open, by tenant
    most = server.settings.limits.tenant_streams

    def may_listen(request: Request) -> tuple[Caller, bool]:
        """Who listens, and whether it is the administrator."""
        sent = authorization(request.headers)
        try:
            return server.keys.admin(sent), True
        except Refusal:
            return server.keys.caller(sent), False

    @app.get("/v1/models/events")  # before that of models, one of which could be called `events`
    async def events(request: Request) -> Response:
        """Every model that the caller may name, then those that changed, once a second at most."""
        who = may_listen(request)
        caller, record = who[0], record_of(request)
        record.tenant = caller.tenant
        if server.host.draining:
            raise Refusal(503, "not_ready", server.host.ready, retry_after=1)
        if (n := len(held[caller.tenant])) >= most:
            told = f"{n} such streams are open, expected at most"
            raise Refusal(429, "too_many_streams", f"{told} {most} with this one")
        if record.method == "HEAD":
            return Response(media_type="text/event-stream")
        held[caller.tenant].add(record.id)

        async def end(_: object = None) -> None:  # perhaps before the first event
            held[caller.tenant].discard(record.id)

        async def following() -> AsyncIterator[bytes]:
            stream = feed.events(*who)
            try:
                async for one in stream:
                    if may_listen(request) != who:  # its key is another one by now
                        break
                    yield one
            except Refusal as refusal:
                record.outcome = refusal.code
            finally:
                await stream.aclose()
                await end()

        return server.streaming(following(), end)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """Every model that the caller may name."""
        caller = server.caller(request)
        found = await server.host.think(lambda: Look(server).listed(caller), caller.tenant)
        return answer({"object": "list", "data": found})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        """One of them."""
        caller = server.caller(request)

        def shown() -> dict[str, Any]:
            if model == registry.base and caller.base:
                return Look(server).base()
            if model in registry.kept.aliases and caller.may(model):
                return Look(server).alias(model)
            found = registry.version(caller, model)
            return Look(server).adapter(found)

        return answer(await server.host.think(shown, caller.tenant))


class Look:
    """What is known at one moment, by names: the adapters that were verified, those still to be,
    those that are wrong and why, what administrators decided, where the adapters are, how many
    completions run and wait, by whether they run, and how many ran; and whether the server is
    ready.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.registry = server, server.registry
        uses, jobs = list(server.metrics.uses.items()), list(server.host.jobs.values())
        self.found, self.listing = dict(self.registry.found), frozenset(self.registry.listed)
        self.wrong, self.kept = dict(self.registry.wrong), self.registry.kept
        self.states, self.ready = server.host.backend.states(), server.host.ready
        self.load = Counter((job.adapter, job.began is not None) for job in jobs)
        self.uses = {name: (use.requests, use.tokens) for name, use in uses}

    def changed(self, before: Look) -> set[str]:
        """The names of what is another thing now, or is there no longer, or is new."""
        old, a, b = before.found, before.kept, self.kept
        found = {name for name, one in self.found.items() if old.get(name) is not one}
        found |= old.keys() - self.found.keys() | (before.listing ^ self.listing)
        moved = _differing(before.states.adapters, self.states.adapters)
        found |= {key.partition("@")[0] for key in moved}
        found |= {name for name, _ in _differing(before.load, self.load)}
        found |= _differing(before.wrong, self.wrong) | _differing(before.uses, self.uses)
        if a is not b:
            found |= {*a.pinned} ^ {*b.pinned} | {*a.unloaded} ^ {*b.unloaded}
            found |= _differing(a.quarantined, b.quarantined) | _differing(a.aliases, b.aliases)
        return found

    def listed(self, caller: Caller, admin: bool = False) -> list[dict[str, Any]]:
        """The models that a caller may name, the base first and aliases last."""
        names = {*self.found, *self.listing, *((*self.wrong, *self.kept.unloaded) if admin else ())}
        aliases = self.kept.aliases
        ordered = [self.registry.base, *sorted(names - aliases.keys()), *sorted(aliases)]
        seen = (self.described(name, admin) for name in ordered if self.sees(caller, name))
        return [one for one in seen if one is not None]

    def sees(self, caller: Caller, name: str) -> bool:
        """Whether a caller may see a model."""
        return caller.base if name == self.registry.base else caller.may(name)

    def described(self, name: str, admin: bool) -> dict[str, Any] | None:
        """A model, as the list has it, None if there is none."""
        if name == self.registry.base:
            return self.base()
        if name in self.kept.aliases:
            return self.alias(name)
        if name in self.found:
            found, held = self.found[name], self.kept.quarantined.get(name)
            why = held[1] if held else found.note
            return self.adapter(found) | ({"why": why} if admin and (held or why) else {})
        if name in self.listing:
            return self._model(name, state="unverified")
        if admin and name in self.kept.unloaded:
            return self._model(name, state="unloaded")
        if admin and name in self.wrong:
            return self._model(name, state="wrong", why=self.wrong[name])
        return None

    def base(self) -> dict[str, Any]:
        """The base, as the list has it."""
        name, length = self.registry.base, self.server.host.backend.length
        about = self._model(name, parent=None, state="resident", max_model_len=length)
        return about | self._use(name)

    def adapter(self, found: AdapterFiles) -> dict[str, Any]:
        """An adapter, as the list has it."""
        state, nbytes = state_of(self.registry, found, self.states)
        about = self._model(
            found.name,
            digest=found.digest,
            state=state,
            pinned=found.name in self.kept.pinned,
            method=found.method,
            rank=found.rank,
            bytes=nbytes,
            page=self.registry.directory.page(found.name) is not None,
        )
        return about | self._use(found.name)

    def alias(self, name: str) -> dict[str, Any]:
        """An alias, as the list has it."""
        targets = self.kept.aliases[name].targets
        shown = [target.model_dump(exclude_none=True) for target in targets]
        return self._model(name, state="alias", targets=shown)

    def _model(self, name: str, **about: Any) -> dict[str, Any]:
        created, parent = self.registry.created, self.registry.base
        head = {"id": name, "object": "model", "created": created, "owned_by": "lorafold"}
        return head | {"parent": parent} | about

    def _use(self, name: str) -> dict[str, Any]:
        requests, tokens = self.uses.get(name, (0, 0))
        use = self.server.metrics.uses.get(name)
        return {
            "running": self.load[name, True],
            "waiting": self.load[name, False],
            "requests": requests,
            "tokens": tokens,
            "first_token_ms": use and use.first_token_ms,
        }


def _differing(a: Mapping[K, object], b: Mapping[K, object]) -> set[K]:
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


class View:
    """What the listeners share that see the same models: the last event and its number."""

    def __init__(self, caller: Caller, admin: bool) -> None:
        self.caller, self.admin = caller, admin
        self.listeners, self.n, self.last, self.ended = 0, 0, b"", False
        self.next = asyncio.Event()

    def tell(self, data: bytes | None) -> None:
        """Tell an event, or that none follows."""
        if data is None:
            self.ended = True
        else:
            self.n, self.last = self.n + 1, data
        self.next.set()
        self.next = asyncio.Event()


class ModelChanges:
    """The changes of one server's models."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._views: dict[object, View] = {}
        self._begun = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def events(self, caller: Caller, admin: bool) -> AsyncGenerator[bytes, None]:
        """The whole list, then what changes, until the server ends."""
        key = (caller.adapters, caller.base, admin)
        view = self._views.setdefault(key, View(caller, admin))
        view.listeners += 1
        if self._task is None:
            self._begun = asyncio.Event()
            self._task = asyncio.create_task(self._run())
        try:
            await self._begun.wait()  # what changes after the list is an event
            while not view.ended:
                n = view.n
                yield await self._server.host.think(partial(self._whole, view), caller.tenant)
                while not view.ended:
                    if view.n == n:
                        await view.next.wait()
                    if view.n > n + 1:
                        break
                    if view.n > n:
                        n += 1
                        yield view.last
        finally:
            view.listeners -= 1
            if not view.listeners and self._views.get(key) is view:
                del self._views[key]

    def _whole(self, view: View) -> bytes:
        now = Look(self._server)
        told: dict[str, Any] = {"object": "list", "data": now.listed(view.caller, view.admin)}
        return event(told | {"status": now.ready, "administrator": view.admin})

    async def _run(self) -> None:
        think = self._server.host.think
        try:
            now = await think(lambda: Look(self._server), OURS)
            self._begun.set()
            while self._views:
                await asyncio.sleep(EACH)
                doing = partial(self._changes, now, list(self._views.values()))
                now, changes = await think(doing, OURS)
                for view, data in changes:
                    view.tell(data)
                if self._server.host.draining:
                    break
        except STOPS:
            raise
        except BaseException:
            log.exception("changes of the models can't be told")
            raise
        finally:
            self._task = None
            self._begun.set()
            for view in self._views.values():
                view.tell(None)
            self._views.clear()

    def _changes(self, before: Look, views: list[View]) -> tuple[Look, list[tuple[View, bytes]]]:
        """Another look, and the events of views that something changed for since the one before."""
        now, found = Look(self._server), list[tuple[View, bytes]]()
        names = sorted(now.changed(before))
        for view in views:
            seen = [name for name in names if now.sees(view.caller, name)]
            models = {name: now.described(name, view.admin) for name in seen}
            gone = [
                name for name, model in models.items()
                if model is None and before.described(name, view.admin)
            ]  # fmt: skip
            new = [model for model in models.values() if model is not None]
            told: dict[str, Any] = {"object": "changes", "data": new, "removed": gone}
            if now.ready != before.ready:
                told["status"] = now.ready
            if new or gone or now.ready != before.ready:
                found.append((view, event(told)))
        return now, found


class UnloadBody(Body):
    """The body of vLLM's route that forgets an adapter. vLLM's number of it has no use here."""

    lora_name: str
    lora_int_id: int | None = None


class LoadBody(UnloadBody):
    """The body of vLLM's route that reads one. Its base is the one that is served, which the files
    are checked against.
    """

    lora_path: str | None = None
    load_inplace: bool = True
    base_model_name: str | None = None

    def check(self, registry: Registry) -> None:
        """Raise Refusal for a path to anything but the directory's entry of that name, and for one
        that is there where it may not be replaced.
        """
        entry = registry.directory.locate(self.lora_name)
        if self.lora_path is not None and not _leads_to(self.lora_path, entry):
            told = f"expected the entry {self.lora_name} of the directory of adapters, or no path"
            raise wrong("lora_path", f"found {self.lora_path!r:.200}, {told}")
        if self.lora_name in registry.found and not self.load_inplace:
            told = f"found false, and {self.lora_name} has already been loaded; true replaces it"
            raise wrong("load_inplace", told)


class Pointed(Body):
    """The body of `PUT /admin/aliases/NAME`: one target, several, or what was there before."""

    target: str | None = None
    targets: list[dict[str, Any]] = Field(default_factory=list, max_length=16)
    rollback: bool = False

    def read(self) -> tuple[AliasTarget, ...]:
        """The targets."""
        if (self.target is None) == (not self.targets):
            raise wrong("target", "expected one of target, targets and rollback")
        name, _, digest = (self.target or "").partition("@")
        given = self.targets or [{"adapter": name, "digest": digest or None}]
        try:
            return tuple(AliasTarget(**one) for one in given)
        except (ValueError, TypeError) as error:
            raise wrong("targets", " ".join(str(error).split())) from None


def administration(app: FastAPI, server: Server) -> None:
    """Add the routes for administration, which need the key for it. Adapters are named by their
    entry in the server's directory; a path may only lead to that entry.
    """
    registry = server.registry

    async def done(change: Callable[[], T]) -> T:
        """Make a change beside the event loop."""
        try:
            return await server.host.think(change, ADMIN)
        except LorafoldError as error:
            raise Refusal(400, "adapter_refused", cut(str(error), REASON)) from None

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        """Read the files of an adapter of the directory, new or changed."""
        caller = server.admin(request)
        body = await server.body(request, caller, LoadBody, lambda body: body)
        name = body.lora_name

        def load_now() -> AdapterFiles:
            body.check(registry)
            return registry.load(name)

        found = await done(load_now)
        return answer({"id": name, "digest": found.digest, "status": "loaded"})

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        """Forget an adapter until it is loaded again. Requests that run finish with it."""
        caller = server.admin(request)
        name = await server.body(request, caller, UnloadBody, lambda body: body.lora_name)
        await done(lambda: registry.unload(name))
        return answer({"id": name, "status": "unloaded"})

    @app.get("/admin/adapters")
    async def adapters(request: Request) -> Response:
        """All adapters: those that are served, that were unloaded, and that are wrong, and why."""
        server.admin(request)

        def listed() -> Response:
            now = Look(server)
            return answer(
                {
                    "adapters": [now.adapter(one) for one in now.found.values()],
                    "unverified": registry.listed,  # which may read the directory
                    "notes": {n: f.note for n, f in now.found.items() if f.note},
                    "unloaded": registry.kept.unloaded,
                    "quarantined": {n: why for n, (_, why) in registry.kept.quarantined.items()},
                    "wrong": dict(registry.wrong),
                    "aliases": registry.kept.aliases,
                }
            )

        return await done(listed)

    @app.post("/admin/adapters/{name}:{act}")
    async def manage(request: Request, name: str, act: str) -> Response:
        """Pin an adapter in memory, unpin it, or refuse its requests."""
        server.admin(request)
        if act not in ACTS:
            told = f"found {act[:40]!r}, expected one of {', '.join(ACTS)}"
            raise Refusal(404, "no_route", told)
        if act == "quarantine":
            await done(lambda: registry.quarantine(name, "the administrator put it there"))
            server.metrics.quarantines.inc()
        else:
            await done(lambda: registry.pin(name, act == "pin"))
        return answer(Look(server).adapter(registry.found[name]))

    @app.put("/admin/aliases/{name}")
    async def point(request: Request, name: str) -> Response:
        """Let an alias stand for other adapters from the next request on."""
        caller = server.admin(request)
        body = await server.body(request, caller, Pointed, lambda body: body)
        if body.rollback:
            alias = await done(lambda: registry.roll_back(name))
        else:
            targets = body.read()
            alias = await done(lambda: registry.point(name, targets))
        return answer({"id": name} | alias.model_dump(exclude_none=True))

    @app.delete("/admin/aliases/{name}")
    async def drop(request: Request, name: str) -> Response:
        """Forget an alias."""
        server.admin(request)
        await done(lambda: registry.drop_alias(name))
        return answer({"id": name, "status": "deleted"})


def _leads_to(path: str, entry: Path) -> bool:
    try:
        return Path(path).resolve() == entry.resolve()
    except (OSError, ValueError):
        return False
