"""`GET /v1/models`: the base, and the adapters and aliases that the caller may use."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.listing import adapter, alias, base, listed, look
from lorafold.serving.server import Server, answer


def routes(server: Server) -> APIRouter:
    """The router."""
    router, registry = APIRouter(), server.registry

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        """Every model that the caller may name."""
        caller = server.caller(request)
        found = await server.host.think(lambda: listed(server, caller, look(server)), caller.tenant)
        return answer({"object": "list", "data": found})

    @router.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        """One of them."""
        caller = server.caller(request)

        def shown() -> dict[str, Any]:
            if model == registry.base and caller.base:
                return base(server, look(server))
            if model in registry.kept.aliases and caller.may(model):
                return alias(server, model, look(server))
            return adapter(server, registry.version(caller, model), look(server))

        return answer(await server.host.think(shown, caller.tenant))

    return router
