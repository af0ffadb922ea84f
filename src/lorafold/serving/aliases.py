"""Aliases: names that stand for adapters, and may stand for others from the next request on."""

from __future__ import annotations

from lorafold.serving.directory import NAME
from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.registry import Registry
from lorafold.serving.state_file import Alias, Target


class Aliases:
    """Changes the aliases of one server. Any thread may call it.

    Args:
        registry: the adapters, and what is kept.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def point(self, name: str, targets: tuple[Target, ...]) -> Alias:
        """Let an alias stand for these targets from the next request on."""
        for target in targets:
            self._registry.known(target.adapter)
        with self._registry.lock:
            taken = {self._registry.base, *self._registry.names()}
            if not NAME.fullmatch(name) or name in taken:
                raise wrong("name", f"found {name[:80]!r}, expected one that no model has")
            for target in targets:
                found = self._registry.served(target.adapter)
                if target.digest and not self._registry.digests.fit(found, target.digest):
                    told = f"found digest {target.digest}, expected {found.digest[:12]}"
                    raise wrong("targets", f"{target.adapter}: {told}")
            before = self._registry.kept.aliases.get(name)
            alias = Alias(targets=targets, previous=before.targets if before else ())
            self._registry.keep(aliases=self._registry.kept.aliases | {name: alias})
            return alias

    def roll_back(self, name: str) -> Alias:
        """Let an alias stand for what it stood for before."""
        alias = self.alias(name)
        if not alias.previous:
            raise Refusal(409, "nothing_before", f"{name} has stood for nothing else before")
        return self.point(name, alias.previous)

    def drop(self, name: str) -> None:
        """Forget an alias."""
        with self._registry.lock:
            self.alias(name)
            aliases = self._registry.kept.aliases
            self._registry.keep(aliases={n: a for n, a in aliases.items() if n != name})

    def alias(self, name: str) -> Alias:
        """An alias. Raises Refusal for an unknown one."""
        if name not in self._registry.kept.aliases:
            raise Refusal(404, "alias_not_found", f"found no alias {name[:80]!r}", "name")
        return self._registry.kept.aliases[name]
