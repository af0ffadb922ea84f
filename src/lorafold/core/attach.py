"""Attachment by class swap: a module's class is replaced by a subclass of itself that runs the live
deltas over it.

The module stays what it was: its keys, `isinstance`, its kernel, `generate` and `save_pretrained`
go on working, and who reads its `.weight` reads the folded one (`lorafold.core.served_weights`).
The deltas it carries are parameters of the model but no part of its state dict. One `Selection` a
model says which names are live.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from lorafold.core.delta import Delta
from lorafold.core.layer import Base, Layer, Over
from lorafold.core.reading import NAMES
from lorafold.core.served_weights import Read
from lorafold.errors import LorafoldError


class Selection:
    """The names that are live in one model, lowest first, and the parameters that attaching
    froze.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.frozen: list[nn.Parameter] = []


class Deltas(nn.ModuleDict):
    """One module's deltas by name.

    They train and move with the model, and are absent from its state dict.
    """

    _prefix = ""

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._prefix = prefix

    def forget_missing(self, _: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [
            k for k in incompatible.missing_keys if not k.startswith(self._prefix)
        ]


class Adapted(nn.Module):
    """Mixed in front of a module's class.

    `base_class` is that class, `layer_class` how its matrix is stored.
    """

    base_class: ClassVar[type[nn.Module]]
    layer_class: ClassVar[type[Base]]
    deltas: Deltas
    selection: Selection
    site: str = ""

    def layer(self, *names: str) -> Layer:
        """The module under the named deltas, those that it carries."""
        layer: Layer = self.layer_class(self)
        for name in names:
            if name in self.deltas:
                layer = Over(self.deltas[name], layer)  # type: ignore[arg-type]
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.base_class, self.layer_class), self.__dict__


@functools.cache
def adapted_class(cls: type[nn.Module], layer_class: type[Base]) -> type[Adapted]:
    """The subclass of `cls` that modules of that class are swapped to; it keeps the name, which
    model files record.
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


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The modules that carry deltas, with their paths."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Adapted))


def selection_of(model: nn.Module) -> Selection:
    """The one selection of a model.

    Parts that were adapted on their own before come under it, in the order they are found.
    """
    found = list({id(m.selection): m.selection for _, m in adapted_modules(model)}.values())
    if not found:
        return Selection()
    first, *others = found
    for other in others:
        if clash := set(first.names) & set(other.names):
            raise LorafoldError(
                "two parts of this model carry adapters of the same name:"
                f" {', '.join(sorted(clash))}; detach one of them"
            )
        first.names += other.names
        first.frozen += other.frozen
    if others:
        for _, m in adapted_modules(model):
            m.selection = first
    return first


def lay(
    module: nn.Module, layer_class: type[Base], name: str, delta: Delta, selection: Selection,
    site: str = "",
) -> None:  # fmt: skip
    """Lay one delta over the module at `site`, above those it carries."""
    if not isinstance(module, Adapted):
        deltas = Deltas()
        deltas.register_load_state_dict_post_hook(deltas.forget_missing)
        module.__class__ = adapted_class(type(module), layer_class)  # type: ignore[arg-type]
        assert isinstance(module, Adapted)
        module.deltas, module.selection, module.site = deltas, selection, site
    module.deltas[name] = delta.train(module.training)


def lift(module: Adapted, name: str) -> None:
    """Take a delta off a module; with the last one its own class returns."""
    del module.deltas[name]
    if not len(module.deltas):
        del module.deltas, module.selection
        module.__dict__.pop("site", None)
        module.__class__ = module.base_class  # type: ignore[assignment]


def freeze(model: nn.Module, selection: Selection) -> None:
    """Freeze the base. What had been trainable is remembered, so that `thaw` restores it."""
    of_deltas = {id(p) for m in model.modules() if isinstance(m, Deltas) for p in m.parameters()}
    for p in model.parameters():
        if p.requires_grad and id(p) not in of_deltas:
            p.requires_grad_(False)
            selection.frozen.append(p)


def thaw(selection: Selection) -> None:
    for p in selection.frozen:
        p.requires_grad_(True)
    selection.frozen = []


class only:
    """`with only(model, "sft"): ...`: these adapters and no others, in this order.

    `only(model)` is the bare base, bit for bit.

    Raises LorafoldError for a name that the model does not carry.
    """

    def __init__(self, model: nn.Module, *names: str) -> None:
        carried = {name for _, m in adapted_modules(model) for name in m.deltas}
        if unknown := [n for n in names if n not in carried]:
            raise LorafoldError(
                f"no adapter {', '.join(unknown)} on this model; it carries:"
                f" {', '.join(sorted(carried)) or 'none'}"
            )
        self.selection, self.names = selection_of(model), names

    def __enter__(self) -> None:
        self.before, self.selection.names = self.selection.names, self.names

    def __exit__(self, *_: object) -> None:
        self.selection.names = self.before
