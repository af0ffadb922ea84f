"""`GET /v1/models`: the base, and the adapters and aliases that the caller may use."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.gauges import state_of
from lorafold.serving.metrics import Use
from lorafold.serving.seen import Found
from lorafold.serving.server import Server, answer


def routes(server: Server) -> APIRouter:
    """The router."""
    router, registry = APIRouter(), server.registry

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        """Every model that the caller may name."""
        caller = server.caller(request)

        def listed() -> list[dict[str, Any]]:
            load = loads(server)
            found = [base(server, load)] if caller.base else []
            known = dict(registry.found)
            for name in sorted({*known, *registry.listed}):
                if caller.may(name) and name in known:
                    found.append(adapter(server, known[name], load))
                elif caller.may(name):
                    found.append(unverified(server, name))
            aliases = sorted(registry.kept.aliases)
            return [*found, *(alias(server, name) for name in aliases if caller.may(name))]

        found = await server.host.think(listed, caller.tenant)
        return answer({"object": "list", "data": found})

    @router.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        """One of them."""
        caller = server.caller(request)

        def shown() -> dict[str, Any]:
            load = loads(server)
            if model == registry.base and caller.base:
                return base(server, load)
            if model in registry.kept.aliases and caller.may(model):
                return alias(server, model)
            return adapter(server, registry.version(caller, model), load)

        return answer(await server.host.think(shown, caller.tenant))

    return router


def loads(server: Server) -> Counter[tuple[str, bool]]:
    """How many completions run and wait, by the adapter's name and whether they run."""
    jobs = list(server.host.jobs.values())
    return Counter((job.adapter, job.began is not None) for job in jobs)


def base(server: Server, load: Counter[tuple[str, bool]]) -> dict[str, Any]:
    """The base, as the list has it.

    Args:
        server: the server.
        load: as `loads` gives it.
    """
    name = server.registry.base
    length = {"parent": None, "state": "resident", "max_model_len": server.host.engine.length}
    return _model(server, name) | length | _use(server, name, load)


def adapter(server: Server, found: Found, load: Counter[tuple[str, bool]]) -> dict[str, Any]:
    """An adapter, as the list has it.

    Args:
        server: the server.
        found: its files.
        load: as `loads` gives it.
    """
    registry = server.registry
    state, nbytes = state_of(registry, found)
    about = {
        "parent": registry.base,
        "digest": found.digest,
        "state": state,
        "pinned": found.name in registry.kept.pinned,
        "method": found.method,
        "rank": found.rank,
        "bytes": nbytes,
        "page": registry.directory.page(found.name) is not None,
    }
    return _model(server, found.name) | about | _use(server, found.name, load)


def unverified(server: Server, name: str) -> dict[str, Any]:
    """An adapter that is still to be verified, as the list has it."""
    return _model(server, name) | {"parent": server.registry.base, "state": "unverified"}


def alias(server: Server, name: str) -> dict[str, Any]:
    """An alias, as the list has it.

    Args:
        server: the server.
        name: the alias.
    """
    targets = server.registry.kept.aliases[name].targets
    shown = [target.model_dump(exclude_none=True) for target in targets]
    about = {"parent": server.registry.base, "state": "alias", "targets": shown}
    return _model(server, name) | about


def _model(server: Server, name: str) -> dict[str, Any]:
    created = server.registry.created
    return {"id": name, "object": "model", "created": created, "owned_by": "lorafold"}


def _use(server: Server, name: str, load: Counter[tuple[str, bool]]) -> dict[str, Any]:
    use = server.metrics.uses.get(name, Use())
    return {
        "running": load[name, True],
        "waiting": load[name, False],
        "requests": use.requests,
        "tokens": use.tokens,
        "first_token_ms": use.first_token_ms,
    }
