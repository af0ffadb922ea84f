"""What the engine lays on the model's modules, and which of it is active in a pass.

A pass of rows that can be mixed runs under the engine's own deltas (`lorafold.engine.products`),
which are laid on a module when the first adapter comes that changes it. A pass of rows of one
adapter that can't be mixed runs under that adapter's deltas themselves, which are on the model
while one of its requests runs; so any method works there, also where a model reads folded weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorafold.bases import layer_class
from lorafold.core.attach import Adapted, lay, lift, selection_of
from lorafold.core.delta import Delta
from lorafold.core.matrices import module_at
from lorafold.engine.adapters import LoadedAdapter
from lorafold.engine.products import EngineDelta, Plan, Products

OWN = "lorafold-engine"


class ActiveDeltas:
    """The engine's deltas on one model.

    Args:
        model: the model; adapters that are active on it now belong to the base.
        products: the factors of the running adapters.
    """

    def __init__(self, model: nn.Module, products: Products) -> None:
        self.model, self.products = model, products
        self.selection = selection_of(model)
        self.base = self.selection.names
        self.mixing = False  # whether a pass under the plan runs
        self.aware: set[str] = set()  # modules whose own fast forward looks at the plan
        self._sites: set[str] = set()
        self._fused: dict[str, Any] = {}  # modules with deltas whose fast forward knows of none
        self._apart: Counter[LoadedAdapter] = Counter()

    def hold(self, held: LoadedAdapter) -> None:
        """Make ready for passes with this adapter, until `drop`."""
        if held.apart:
            self._apart[held] += 1
            if self._apart[held] == 1:
                for path, delta in held.deltas.items():
                    self._lay(path, held.entry.key, delta)
            return
        for path in sorted(held.paths - self._sites):
            self._lay(path, OWN, EngineDelta(self.products, path))
            self._sites.add(path)

    def drop(self, held: LoadedAdapter) -> None:
        """Undo one `hold`."""
        if held.apart:
            self._apart[held] -= 1
            if not self._apart[held]:
                del self._apart[held]
                for path in held.deltas:
                    self._lift(path, held.entry.key)

    @contextmanager
    def mixed(self, plan: Plan) -> Iterator[None]:
        """A pass whose rows have the adapters of the plan."""
        self.products.plan, self.mixing = plan, True
        try:
            with self._active(plan.paths, *((OWN,) if plan.paths else ())):
                yield
        finally:
            self.mixing = False

    @contextmanager
    def alone(self, held: LoadedAdapter) -> Iterator[None]:
        """A pass whose rows all have this adapter, which can't be mixed."""
        with self._active(held.paths, held.entry.key):
            yield

    def close(self) -> None:
        """Take everything off the model."""
        for held in list(self._apart):
            self._apart[held] = 1
            self.drop(held)
        for path in self._sites:
            self._lift(path, OWN)
        self._sites.clear()

    @contextmanager
    def _active(self, paths: frozenset[str], *names: str) -> Iterator[None]:
        before = self.selection.names
        hidden = {
            path: vars(module).pop("forward")
            for path, module in self._fused.items()
            if path in paths
        }
        self.selection.names = (*self.base, *names)
        try:
            yield
        finally:
            self.selection.names = before
            for path, forward in hidden.items():
                self._fused[path].forward = forward

    def _lay(self, path: str, name: str, delta: Delta) -> None:
        module = module_at(self.model, path)
        if path not in self.aware and "forward" in vars(module):
            self._fused[path] = module
        lay(module, layer_class(module), name, delta.eval(), self.selection, path)

    def _lift(self, path: str, name: str) -> None:
        module = module_at(self.model, path)
        if isinstance(module, Adapted) and name in module.deltas:
            lift(module, name)
        if not isinstance(module, Adapted):
            self._fused.pop(path, None)
