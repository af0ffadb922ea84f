"""Which models changed between two looks at them.

    before = look(server)
    changed(before, look(server))       {"sql", "base"}: their states, counts, files or existence

A look copies what is known of all adapters and computes nothing for those that are only files, so
that it costs little where there are thousands; only what changed is then described anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from lorafold.serving.backend import States
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
