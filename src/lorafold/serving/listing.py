"""Models as `GET /v1/models` lists them, its stream of changes, and the administrator's list.

`look` copies what is known of all adapters, and `changed` compares two looks, so only models that
changed are described again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lorafold.serving.backend import States
from lorafold.serving.gauges import state_of
from lorafold.serving.keys import Caller
from lorafold.serving.seen import Found
from lorafold.serving.server import Server
from lorafold.serving.state_file import ServerState

K = TypeVar("K")


@dataclass(frozen=True)
class Look:
    """What is known at one moment, by names: the adapters that were verified, those still to be,
    those that are wrong and why, what administrators decided, where the adapters are, how many
    completions run and wait, and how many ran.
    """

    found: Mapping[str, Found]
    listed: frozenset[str]
    wrong: Mapping[str, str]
    kept: ServerState
    states: States
    load: Mapping[tuple[str, bool], int]
    uses: Mapping[str, tuple[int, int]]


def look(server: Server) -> Look:
    """What is known now."""
    registry = server.registry
    uses = list(server.metrics.uses.items())
    return Look(
        dict(registry.found), frozenset(registry.listed), dict(registry.wrong), registry.kept,
        server.host.backend.states(), loads(server),
        {name: (use.requests, use.tokens) for name, use in uses},
    )  # fmt: skip


def loads(server: Server) -> Counter[tuple[str, bool]]:
    """How many completions run and wait, by the adapter's name and whether they run."""
    jobs = list(server.host.jobs.values())
    return Counter((job.adapter, job.began is not None) for job in jobs)


def changed(before: Look, now: Look) -> set[str]:
    """The names of what is another thing now, or is there no longer, or is new."""
    old = before.found
    found = {name for name, one in now.found.items() if old.get(name) is not one}
    found |= old.keys() - now.found.keys()
    moved = _differing(before.states.adapters, now.states.adapters)
    versions = {key.partition("@")[0] for key in moved}
    loaded = {name for name, _ in _differing(before.load, now.load)}
    names = found | versions | loaded | (before.listed ^ now.listed)
    names |= _differing(before.wrong, now.wrong) | _differing(before.uses, now.uses)
    if before.kept is not now.kept:
        a, b = before.kept, now.kept
        names |= {*a.pinned} ^ {*b.pinned} | {*a.unloaded} ^ {*b.unloaded}
        names |= _differing(a.quarantined, b.quarantined)
        names |= _differing(a.aliases, b.aliases)
    return names


def _differing(a: Mapping[K, object], b: Mapping[K, object]) -> set[K]:
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


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
