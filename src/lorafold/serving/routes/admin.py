"""The routes for administration, which need the key for it.

Adapters are named by their entry in the server's directory; a path may only lead to that entry.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.errors import LorafoldError, cut
from lorafold.serving.backend import Found
from lorafold.serving.body import Body
from lorafold.serving.keys import ADMIN
from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.registry import REASON, Registry, Target
from lorafold.serving.routes.models import Look
from lorafold.serving.server import Server, answer

T = TypeVar("T")
ACTS = ("pin", "unpin", "quarantine")


class Named(Body):
    """The body of vLLM's route that forgets an adapter. vLLM's number of it has no use here."""

    lora_name: str
    lora_int_id: int | None = None


class Loaded(Named):
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

    def read(self) -> tuple[Target, ...]:
        """The targets. Raises Refusal for none, or for both kinds."""
        if (self.target is None) == (not self.targets):
            raise wrong("target", "expected one of target, targets and rollback")
        name, _, digest = (self.target or "").partition("@")
        given = self.targets or [{"adapter": name, "digest": digest or None}]
        try:
            return tuple(Target(**one) for one in given)
        except (ValueError, TypeError) as error:
            raise wrong("targets", " ".join(str(error).split())) from None


def routes(app: FastAPI, server: Server) -> None:
    """Add them."""
    registry = server.registry

    async def done(change: Callable[[], T]) -> T:
        """Make a change beside the event loop. Raises Refusal for one that can't be made."""
        try:
            return await server.host.think(change, ADMIN)
        except LorafoldError as error:
            raise Refusal(400, "adapter_refused", cut(str(error), REASON)) from None

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        """Read the files of an adapter of the directory, new or changed."""
        caller = server.admin(request)
        body = await server.body(request, caller, Loaded, lambda body: body)
        name = body.lora_name

        def load_now() -> Found:
            body.check(registry)
            return registry.load(name)

        found = await done(load_now)
        return answer({"id": name, "digest": found.digest, "status": "loaded"})

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        """Forget an adapter until it is loaded again. Requests that run finish with it."""
        caller = server.admin(request)
        name = await server.body(request, caller, Named, lambda body: body.lora_name)
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
