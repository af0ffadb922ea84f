"""Routes for models: their list, changes as server-sent events, and administration."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.errors import LorafoldError, truncate
from lorafold.serving.backend import AdapterFiles
from lorafold.serving.keys import ADMIN, Caller
from lorafold.serving.metrics import state_of
from lorafold.serving.refusals import Refusal, invalid
from lorafold.serving.registry import MAX_REASON, AliasTarget, Registry
from lorafold.serving.request_body import Body, sse_event
from lorafold.serving.server import Server, authorization, json_response, record_of

K = TypeVar("K")
T = TypeVar("T")
SNAPSHOT_INTERVAL = 1.0  # seconds between two snapshots
ACTIONS = ("pin", "unpin", "quarantine")


def routes(app: FastAPI, server: Server) -> None:
    changes, registry = ModelChanges(server), server.registry
    streams = defaultdict[str, set[str]](set)  # open streams by tenant
    limit = server.settings.limits.tenant_streams

    def caller_and_admin(request: Request) -> tuple[Caller, bool]:
        header = authorization(request.headers)
        try:
            return server.keys.admin(header), True
        except Refusal:
            return server.keys.caller(header), False

    @app.get("/v1/models/events")  # before /v1/models/{model}, which also matches this path
    async def events(request: Request) -> Response:
        """Streams all models that the caller may use, then changes, at most once a second."""
        access = caller_and_admin(request)
        caller, record = access[0], record_of(request)
        record.tenant = caller.tenant
        if server.host.draining:
            raise Refusal(503, "not_ready", server.host.not_ready, retry_after=1)
        if (n := len(streams[caller.tenant])) >= limit:
            message = f"{n} event streams are already open, and the limit is {limit}; close one"
            raise Refusal(429, "too_many_streams", message)
        if record.method == "HEAD":
            return Response(media_type="text/event-stream")
        streams[caller.tenant].add(record.id)

        async def end(_: object = None) -> None:  # may be called before the first event
            streams[caller.tenant].discard(record.id)

        async def until_access_changes() -> AsyncIterator[bytes]:
            stream = changes.events(*access)
            try:
                async for data in stream:
                    if caller_and_admin(request) != access:  # the key was revoked or changed
                        break
                    yield data
            except Refusal as refusal:
                record.outcome = refusal.code
            finally:
                await stream.aclose()
                await end()

        return server.streaming(until_access_changes(), end)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """Lists the models that the caller may use."""
        caller = server.caller(request)
        models = await server.host.in_thread(lambda: Snapshot(server).models(caller), caller.tenant)
        return json_response({"object": "list", "data": models})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        """Returns one model."""
        caller = server.caller(request)

        def described() -> dict[str, Any]:
            if model == registry.base and caller.base:
                return Snapshot(server).base()
            if model in registry.state.aliases and caller.may_use(model):
                return Snapshot(server).alias(model)
            return Snapshot(server).adapter(registry.find_version(caller, model))

        return json_response(await server.host.in_thread(described, caller.tenant))


class Snapshot:
    def __init__(self, server: Server) -> None:
        self.server, registry = server, server.registry
        uses, jobs = list(server.metrics.uses.items()), list(server.host.jobs.values())
        self.registry, self.state = registry, registry.state
        self.adapters, self.unverified = dict(registry.adapters), frozenset(registry.unverified)
        self.rejected = dict(registry.rejected)
        self.states, self.not_ready = server.host.backend.states(), server.host.not_ready
        self.load = Counter((job.adapter, job.began is not None) for job in jobs)
        self.uses = {name: (use.requests, use.tokens) for name, use in uses}
        self.taken_at, self.draining = time.monotonic(), server.host.draining
        self._changed: dict[float, list[str]] = {}
        self._events: dict[object, bytes] = {}

    def event(self, before: Snapshot | None, caller: Caller, admin: bool) -> bytes:
        """Returns a caller's models or, if an earlier snapshot is given, the changes since then,
        which may be empty. Cached for callers with the same rights.
        """
        key = caller.adapters, caller.base, admin, before and before.taken_at
        if key not in self._events:
            self._events[key] = self._event(before, caller, admin)
        return self._events[key]

    def _event(self, before: Snapshot | None, caller: Caller, admin: bool) -> bytes:
        if before is None:
            head = {"object": "list", "data": self.models(caller, admin)}
            return sse_event(head | {"status": self.not_ready, "administrator": admin})
        if before.taken_at not in self._changed:
            self._changed[before.taken_at] = sorted(self._changed_names(before))
        names = [name for name in self._changed[before.taken_at] if self._sees(caller, name)]
        models = {name: self._described(name, admin) for name in names}
        new = [model for model in models.values() if model]
        gone = [n for n, model in models.items() if not model and before._described(n, admin)]
        status = {} if self.not_ready == before.not_ready else {"status": self.not_ready}
        changes = {"object": "changes", "data": new, "removed": gone}
        return sse_event(changes | status) if new or gone or status else b""

    def _changed_names(self, before: Snapshot) -> set[str]:
        old, a, b = before.adapters, before.state, self.state
        names = {name for name, adapter in self.adapters.items() if old.get(name) is not adapter}
        names |= old.keys() - self.adapters.keys() | (before.unverified ^ self.unverified)
        keys = _changed(before.states.adapters, self.states.adapters)
        names |= {key.partition("@")[0] for key in keys}
        names |= {name for name, _ in _changed(before.load, self.load)}
        names |= _changed(before.rejected, self.rejected) | _changed(before.uses, self.uses)
        if a is not b:
            names |= {*a.pinned} ^ {*b.pinned} | {*a.unloaded} ^ {*b.unloaded}
            names |= _changed(a.quarantined, b.quarantined) | _changed(a.aliases, b.aliases)
        return names

    def models(self, caller: Caller, admin: bool = False) -> list[dict[str, Any]]:
        aliases, names = self.state.aliases, {*self.adapters, *self.unverified}
        if admin:
            names |= {*self.rejected, *self.state.unloaded}
        ordered = [self.registry.base, *sorted(names - aliases.keys()), *sorted(aliases)]
        models = (self._described(name, admin) for name in ordered if self._sees(caller, name))
        return [model for model in models if model]

    def _sees(self, caller: Caller, name: str) -> bool:
        return caller.base if name == self.registry.base else caller.may_use(name)

    def _described(self, name: str, admin: bool) -> dict[str, Any] | None:
        if name == self.registry.base:
            return self.base()
        if name in self.state.aliases:
            return self.alias(name)
        if name in self.adapters:
            adapter, quarantined = self.adapters[name], self.state.quarantined.get(name)
            why = quarantined[1] if quarantined else adapter.note
            return self.adapter(adapter) | ({"why": why} if admin and (quarantined or why) else {})
        if name in self.unverified:
            return self._model(name, state="unverified")
        if admin and name in self.state.unloaded:
            return self._model(name, state="unloaded")
        if admin and name in self.rejected:
            return self._model(name, state="wrong", why=self.rejected[name])
        return None

    def base(self) -> dict[str, Any]:
        name, length = self.registry.base, self.server.host.backend.length
        model = self._model(name, parent=None, state="resident", max_model_len=length)
        return model | self._use(name)

    def adapter(self, adapter: AdapterFiles) -> dict[str, Any]:
        state, nbytes = state_of(self.registry, adapter, self.states)
        model = self._model(
            adapter.name,
            digest=adapter.digest,
            state=state,
            pinned=adapter.name in self.state.pinned,
            method=adapter.method,
            rank=adapter.rank,
            single_turn=adapter.single_turn,
            bytes=nbytes,
            page=self.registry.directory.page_file(adapter.name) is not None,
        )
        return model | self._use(adapter.name)

    def alias(self, name: str) -> dict[str, Any]:
        targets = self.state.aliases[name].targets
        shown = [target.model_dump(exclude_none=True) for target in targets]
        single = any(a and a.single_turn for a in (self.adapters.get(t.adapter) for t in targets))
        return self._model(name, state="alias", targets=shown, single_turn=single)

    def _model(self, name: str, **fields: Any) -> dict[str, Any]:
        created, parent = self.registry.created, self.registry.base
        head = {"id": name, "object": "model", "created": created, "owned_by": "lorafold"}
        return head | {"parent": parent} | fields

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


def _changed(a: Mapping[K, object], b: Mapping[K, object]) -> set[K]:
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


class ModelChanges:
    def __init__(self, server: Server) -> None:
        self._server, self._snapshot = server, Snapshot(server)
        self._lock = asyncio.Lock()

    async def events(self, caller: Caller, admin: bool) -> AsyncGenerator[bytes, None]:
        before = None
        while True:
            async with self._lock:
                changes = partial(self._changes, before, caller, admin)
                now, data = await self._server.host.in_thread(changes, tenant="")
            if data:
                yield data
            if now.draining:
                return
            before = now
            await asyncio.sleep(now.taken_at + SNAPSHOT_INTERVAL - time.monotonic())

    def _changes(
        self, before: Snapshot | None, caller: Caller, admin: bool
    ) -> tuple[Snapshot, bytes]:
        now = self._snapshot
        if before is None or time.monotonic() - now.taken_at >= SNAPSHOT_INTERVAL:
            now = self._snapshot = Snapshot(self._server)
        return now, now.event(before, caller, admin)


class UnloadBody(Body):
    """The body of `POST /v1/unload_lora_adapter`; `lora_int_id` is ignored."""

    lora_name: str
    lora_int_id: int | None = None


class LoadBody(UnloadBody):
    """The body of `POST /v1/load_lora_adapter`; `base_model_name` is ignored."""

    lora_path: str | None = None
    load_inplace: bool = True
    base_model_name: str | None = None

    def load(self, registry: Registry) -> AdapterFiles:
        """Loads the adapter. Raises if the path is not the directory's entry of this name, or if
        the adapter exists and may not be replaced.
        """
        name, path = self.lora_name, self.lora_path
        entry, same = registry.directory.locate(name), path is None
        if path is not None:
            with suppress(OSError, ValueError):
                same = Path(path).resolve() == entry.resolve()
        if not same:
            expected = f"expected the path of {name} in the directory of adapters, or no path"
            raise invalid("lora_path", f"found {path!r:.200}, {expected}")
        if name in registry.adapters and not self.load_inplace:
            message = f"found false, but {name} is already loaded; set true to replace it"
            raise invalid("load_inplace", message)
        return registry.load(name)


class AliasBody(Body):
    """The body of `PUT /admin/aliases/NAME`: one target, several, or a rollback."""

    target: str | None = None
    targets: list[dict[str, Any]] = Field(default_factory=list, max_length=16)
    rollback: bool = False

    def read(self) -> tuple[AliasTarget, ...]:
        if (self.target is None) == (not self.targets):
            raise invalid("target", "expected exactly one of target, targets and rollback")
        name, _, digest = (self.target or "").partition("@")
        targets = self.targets or [{"adapter": name, "digest": digest or None}]
        try:
            return tuple(AliasTarget(**target) for target in targets)
        except (ValueError, TypeError) as error:
            raise invalid("targets", " ".join(str(error).split())) from None


def administration(app: FastAPI, server: Server) -> None:
    registry = server.registry

    async def run_change(change: Callable[[], T]) -> T:
        try:
            return await server.host.in_thread(change, ADMIN)
        except LorafoldError as error:
            raise Refusal(400, "adapter_refused", truncate(str(error), MAX_REASON)) from None

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        """Loads a new or changed adapter from the directory."""
        body = await server.body(request, server.admin(request), LoadBody, lambda body: body)
        adapter = await run_change(lambda: body.load(registry))
        return json_response({"id": adapter.name, "digest": adapter.digest, "status": "loaded"})

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        """Removes an adapter until it is loaded again. Running requests finish."""
        caller = server.admin(request)
        name = await server.body(request, caller, UnloadBody, lambda body: body.lora_name)
        await run_change(lambda: registry.unload(name))
        return json_response({"id": name, "status": "unloaded"})

    @app.get("/admin/adapters")
    async def adapters(request: Request) -> Response:
        """Lists all adapters: served, unloaded, and rejected ones with the reason."""
        server.admin(request)

        def listed() -> Response:
            now = Snapshot(server)
            return json_response(
                {
                    "adapters": [now.adapter(a) for a in now.adapters.values()],
                    "unverified": registry.unverified,  # may read the directory
                    "notes": {a.name: a.note for a in now.adapters.values() if a.note},
                    "unloaded": now.state.unloaded,
                    "quarantined": {n: why for n, (_, why) in now.state.quarantined.items()},
                    "wrong": now.rejected,
                    "aliases": now.state.aliases,
                }
            )

        return await run_change(listed)

    @app.post("/admin/adapters/{name}:{act}")
    async def manage(request: Request, name: str, act: str) -> Response:
        """Pins an adapter in memory, unpins it, or puts it in quarantine."""
        server.admin(request)
        if act not in ACTIONS:
            message = f"action: found {act[:40]!r}, expected one of {', '.join(ACTIONS)}"
            raise Refusal(404, "no_route", message)
        if act == "quarantine":
            await run_change(lambda: registry.quarantine(name, "quarantined by the administrator"))
            server.metrics.quarantines.inc()
        else:
            await run_change(lambda: registry.pin(name, act == "pin"))
        return json_response(Snapshot(server).adapter(registry.adapters[name]))

    @app.put("/admin/aliases/{name}")
    async def point(request: Request, name: str) -> Response:
        """Sets an alias's targets, or restores the earlier ones, from the next request on."""
        body = await server.body(request, server.admin(request), AliasBody, lambda body: body)
        if body.rollback:
            alias = await run_change(lambda: registry.roll_back(name))
        else:
            targets = body.read()
            alias = await run_change(lambda: registry.set_alias(name, targets))
        return json_response({"id": name} | alias.model_dump(exclude_none=True))

    @app.delete("/admin/aliases/{name}")
    async def drop(request: Request, name: str) -> Response:
        """Deletes an alias."""
        server.admin(request)
        await run_change(lambda: registry.delete_alias(name))
        return json_response({"id": name, "status": "deleted"})
