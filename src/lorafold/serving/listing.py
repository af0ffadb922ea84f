"""Models as `GET /v1/models` lists them, its stream of changes, and the administrator's list."""

from __future__ import annotations

from typing import Any

from lorafold.serving.changes import Look
from lorafold.serving.gauges import state_of
from lorafold.serving.keys import Caller
from lorafold.serving.seen import Found
from lorafold.serving.server import Server


def listed(server: Server, caller: Caller, now: Look, admin: bool = False) -> list[dict[str, Any]]:
    """The models that a caller may name, the base first and aliases last.

    Args:
        now: what is known.
        admin: list what is not served too, and why.
    """
    names = {*now.found, *now.listed, *((*now.wrong, *now.kept.unloaded) if admin else ())}
    aliases = now.kept.aliases
    ordered = [server.registry.base, *sorted(names - aliases.keys()), *sorted(aliases)]
    seen = (described(server, name, now, admin) for name in ordered if sees(server, caller, name))
    return [one for one in seen if one is not None]


def sees(server: Server, caller: Caller, name: str) -> bool:
    """Whether a caller may see a model."""
    return caller.base if name == server.registry.base else caller.may(name)


def described(server: Server, name: str, now: Look, admin: bool) -> dict[str, Any] | None:
    """A model, as the list has it, None if there is none.

    Args:
        now: what is known.
        admin: describe what is not served too, and why.
    """
    if name == server.registry.base:
        return base(server, now)
    if name in now.kept.aliases:
        return alias(server, name, now)
    parent = {"parent": server.registry.base}
    if name in now.found:
        found, held = now.found[name], now.kept.quarantined.get(name)
        why = {"why": held[1] if held else found.note} if admin and (held or found.note) else {}
        return adapter(server, found, now) | why
    if name in now.listed:
        return _model(server, name) | parent | {"state": "unverified"}
    if admin and name in now.kept.unloaded:
        return _model(server, name) | parent | {"state": "unloaded"}
    if admin and name in now.wrong:
        return _model(server, name) | parent | {"state": "wrong", "why": now.wrong[name]}
    return None


def base(server: Server, now: Look) -> dict[str, Any]:
    """The base, as the list has it.

    Args:
        now: what is known.
    """
    name = server.registry.base
    length = {"parent": None, "state": "resident", "max_model_len": server.host.backend.length}
    return _model(server, name) | length | _use(server, name, now)


def adapter(server: Server, found: Found, now: Look) -> dict[str, Any]:
    """An adapter, as the list has it.

    Args:
        now: what is known.
    """
    registry = server.registry
    state, nbytes = state_of(registry, found, now.states)
    about = {
        "parent": registry.base,
        "digest": found.digest,
        "state": state,
        "pinned": found.name in now.kept.pinned,
        "method": found.method,
        "rank": found.rank,
        "bytes": nbytes,
        "page": registry.directory.page(found.name) is not None,
    }
    return _model(server, found.name) | about | _use(server, found.name, now)


def alias(server: Server, name: str, now: Look) -> dict[str, Any]:
    """An alias, as the list has it.

    Args:
        now: what is known.
    """
    targets = now.kept.aliases[name].targets
    shown = [target.model_dump(exclude_none=True) for target in targets]
    about = {"parent": server.registry.base, "state": "alias", "targets": shown}
    return _model(server, name) | about


def _model(server: Server, name: str) -> dict[str, Any]:
    created = server.registry.created
    return {"id": name, "object": "model", "created": created, "owned_by": "lorafold"}


def _use(server: Server, name: str, now: Look) -> dict[str, Any]:
    requests, tokens = now.uses.get(name, (0, 0))
    use = server.metrics.uses.get(name)
    return {
        "running": now.load.get((name, True), 0),
        "waiting": now.load.get((name, False), 0),
        "requests": requests,
        "tokens": tokens,
        "first_token_ms": use and use.first_token_ms,
    }
