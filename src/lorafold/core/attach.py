"""Deltas are attached by a class swap: a module's class is replaced by a subclass of itself that
runs the active deltas.

State dict keys, `isinstance`, the module's own kernel, `generate` and `save_pretrained` go on
working, and code that reads `module.weight` gets the folded weight
(`lorafold.core.served_weights`). The attached deltas are parameters of the model but not part of
its state dict. One `Selection` per model holds the names of the active adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorafold.core.base import Base
from lorafold.core.delta import Delta
from lorafold.core.layer import Layer, Over
from lorafold.core.reading import NAMES
from lorafold.core.served_weights import Read
from lorafold.errors import LorafoldError


@dataclass(eq=False)
class Origin:
    """The files of one adapter on a model.

    name: the adapter's name on the model.
    path: the directory that it was last loaded from or saved to, as it was given.
    sha256: the digest of these files; empty for an adapter that was neither loaded nor saved, and
        for one that was merged since.
    """

    name: str = ""
    path: str = ""
    sha256: str = ""


@dataclass(frozen=True, eq=False)
class Draws:
    """What random draws follow from (`core.draws`): a key of 63 bits, and the name of each token of
    the batch that is computed, int64 (B, T).
    """

    key: int
    names: Tensor


class Selection:
    """The names of the adapters that are active in one model, lowest first, the files of each
    adapter on it by its name, the parameters that attaching froze, and what is drawn from.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.origins: dict[str, Origin] = {}
        self.frozen: list[nn.Parameter] = []
        self.draws: Draws | None = None

    @property
    def active(self) -> tuple[Origin, ...]:
        """The files of the active adapters, lowest first."""
        return tuple(self.origins.setdefault(name, Origin(name)) for name in self.names)


class Deltas(nn.ModuleDict):
    """The deltas attached to one module, by the adapter's name.

    They train and move with the model, and are absent from its state dict. A delta in which nothing
    is trained stays in evaluation mode: no dropout acts on what an adapter above it learns from.
    """

    _prefix = ""

    def train(self, mode: bool = True) -> Self:
        """Put the deltas in training mode, except those in which nothing is trained.

        Args:
            mode: training mode, or evaluation mode for all of them.
        """
        super().train(mode)
        delta: Any
        for delta in self.values() if mode else ():
            if not any(p.requires_grad for p in (*delta.parameters(), *delta.borrowed())):
                delta.eval()
        return self

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Add nothing to `destination` and return it, so that the model's keys stay its own.

        Args:
            destination: the dictionary that the model collects its tensors in.
            prefix, keep_vars: as in `nn.Module.state_dict`; not used.
        """
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._prefix = prefix

    def forget_missing(self, _: nn.Module, incompatible: Any) -> None:
        """Hook after `load_state_dict`: remove the deltas' keys from the missing ones."""
        incompatible.missing_keys[:] = [
            k for k in incompatible.missing_keys if not k.startswith(self._prefix)
        ]


class Adapted(nn.Module):
    """A module with deltas attached: the mixin that `adapted_class` puts before its own class.

    `base_class` is the module's own class, `layer_class` the layer that reads its storage, `site`
    its module path.
    """

    base_class: ClassVar[type[nn.Module]]
    layer_class: ClassVar[type[Base]]
    deltas: Deltas
    selection: Selection
    site: str = ""

    def layer(self, *names: str, base: Base | None = None) -> Layer:
        """The module as a layer under those of the named deltas that are attached to it.

        Args:
            *names: the names of the adapters, lowest first.
            base: the layer at the bottom, if it is made already.
        """
        layer: Layer = base or self.layer_class(self)
        for delta in deltas_on(self, names):
            layer = Over(delta, layer)
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.base_class, self.layer_class), self.__dict__


@functools.cache
def adapted_class(cls: type[nn.Module], layer_class: type[Base]) -> type[Adapted]:
    """Make the subclass of `cls` that modules of class `cls` are swapped to.

    It has the name of `cls`, since model files record that name.
    """

    def forward(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*self.selection.names)(*args, **kwargs)

    body = {
        "forward": functools.wraps(cls.forward)(forward),
        "base_class": cls,
        "layer_class": layer_class,
        **{name: Read(name) for name in NAMES if not hasattr(cls, name)},
    }
    swapped = type(cls.__name__, (Adapted, cls), body)
    swapped.__module__, swapped.__qualname__ = cls.__module__, cls.__qualname__
    return swapped


def _rebuild(cls: type[nn.Module], layer_class: type[Base]) -> Adapted:
    swapped = adapted_class(cls, layer_class)  # type: ignore[arg-type]
    return swapped.__new__(swapped)


def deltas_on(module: nn.Module, names: Iterable[str]) -> list[Delta]:
    """The deltas that the named adapters have on a module, in their order."""
    if not isinstance(module, Adapted):
        return []
    return [module.deltas[name] for name in names if name in module.deltas]  # type: ignore[misc]


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield the path and module of each module with deltas attached."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Adapted))


def selection_of(model: nn.Module) -> Selection:
    """Return the one selection of a model, a new one if the model has none.

    Where parts of the model were adapted before they were joined, their selections become one, in
    the order in which they are found. Raises LorafoldError if two of them share an adapter's name.
    """
    found = list({id(m.selection): m.selection for _, m in adapted_modules(model)}.values())
    if not found:
        return Selection()
    first, *others = found
    for other in others:
        if clash := set(first.names) & set(other.names):
            raise LorafoldError(
                "two parts of this model have adapters of the same name:"
                f" {', '.join(sorted(clash))}; detach one of them"
            )
        first.names += other.names
        first.origins |= other.origins
        first.frozen += other.frozen
    if others:
        for _, m in adapted_modules(model):
            m.selection = first
    return first


def lay(
    module: nn.Module, layer_class: type[Base], name: str, delta: Delta, selection: Selection,
    site: str = "",
) -> None:  # fmt: skip
    """Attach one delta to a module, above those that are attached already.

    Args:
        module: the module; its class is swapped if it has no delta yet.
        layer_class: the layer that reads the module's storage.
        name: the name of the adapter that the delta belongs to.
        delta: the delta.
        selection: the selection of the model.
        site: the module path, which error messages name.
    """
    if not isinstance(module, Adapted):
        deltas = Deltas()
        deltas.register_load_state_dict_post_hook(deltas.forget_missing)
        module.__class__ = adapted_class(type(module), layer_class)  # type: ignore[arg-type]
        assert isinstance(module, Adapted)
        module.deltas, module.selection, module.site = deltas, selection, site
        layer_class.entered(module)
    module.deltas[name] = delta.train(module.training)


def lift(module: Adapted, name: str) -> None:
    """Detach a delta from a module; without any delta the module has its own class again."""
    del module.deltas[name]
    if not len(module.deltas):
        del module.deltas, module.selection
        module.__dict__.pop("site", None)
        layer_class = module.layer_class
        module.__class__ = module.base_class  # type: ignore[assignment]
        layer_class.left(module)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Freeze the base. The selection keeps what was trainable, so that `thaw` restores it."""
    of_deltas = {id(p) for m in model.modules() if isinstance(m, Deltas) for p in m.parameters()}
    for p in model.parameters():
        if p.requires_grad and id(p) not in of_deltas:
            p.requires_grad_(False)
            selection.frozen.append(p)


def thaw(selection: Selection) -> None:
    """Make the parameters trainable again that `freeze` froze."""
    for p in selection.frozen:
        p.requires_grad_(True)
    selection.frozen = []


class only:
    """Context in which the named adapters are active and no others, the first one lowest.

    `with only(model, "sft"): ...`; `only(model)` is the bare base, bit for bit.

    Raises LorafoldError if no adapter of a given name is attached to the model.
    """

    def __init__(self, model: nn.Module, *names: str) -> None:
        carried = {name for _, m in adapted_modules(model) for name in m.deltas}
        if unknown := [n for n in names if n not in carried]:
            raise LorafoldError(
                f"no adapter {', '.join(unknown)} is attached to this model; the attached ones:"
                f" {', '.join(sorted(carried)) or 'none'}"
            )
        self.selection, self.names = selection_of(model), names

    def __enter__(self) -> None:
        self.before, self.selection.names = self.selection.names, self.names

    def __exit__(self, *_: object) -> None:
        self.selection.names = self.before
