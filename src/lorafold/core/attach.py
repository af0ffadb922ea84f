"""Attaches deltas by replacing a module's class with a subclass that runs the active deltas.

The module keeps its state-dict keys, its `isinstance` checks and its kernel. The state dict also
contains the deltas' tensors, as `<module path>.deltas.<adapter>.<tensor>`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorafold.core.active_adapters import OnlyBlock, Selection, StateDictLoading
from lorafold.core.active_adapters import Origin as Origin
from lorafold.core.delta import SETTINGS, Delta, Over, check_settings, encoded_settings
from lorafold.core.folded_weights import NAMES, WeightDescriptor
from lorafold.core.layer import BaseLayer, Layer
from lorafold.errors import LorafoldError, listed

_without_deltas = ContextVar("base_alone", default=False)


class Deltas(nn.ModuleDict):
    """The deltas of one module, by adapter name.

    Frozen deltas stay in evaluation mode, because their dropout would affect an adapter that is
    trained on top of them.
    """

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection
        self._state_adapters: tuple[str, set[str]] = "", set()  # of the loaded state dict
        self.register_load_state_dict_post_hook(self._drop_missing_keys)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; only deltas with trainable parameters enter training mode."""
        super().train(mode)
        delta: Any
        for delta in self.values() if mode else ():
            own = any(p.requires_grad for p in delta.parameters())
            if not (own or any(p.requires_grad for p in delta.borrowed())):
                delta.eval()
        return self

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Returns the deltas' tensors, without parameters of the base, which the model's state dict
        already contains.
        """
        if _without_deltas.get():
            return {} if destination is None else destination
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key in self._keys_of_base(prefix, state):
            del state[key]
        for name, delta in self.items():
            if (settings := encoded_settings(delta)) is not None:  # type: ignore[arg-type]
                state[f"{prefix}{name}.{SETTINGS}"] = settings
        return state

    def _keys_of_base(self, prefix: str, keys: Iterable[str]) -> list[str]:
        inside = [path for path, m in self.named_modules() if getattr(m, "in_place", False)]
        under = tuple(f"{prefix}{path}." for path in inside)
        return [key for key in keys if key.startswith(under)] if under else []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, strict, _, unexpected, _ = args
        names = {key: key.removeprefix(prefix).partition(".")[0] for key in state_dict}
        if strict:
            unexpected += [key for key, name in names.items() if name not in self]
        for name, delta in self.items():
            settings = state_dict.pop(f"{prefix}{name}.{SETTINGS}", None)
            if settings is not None:
                where = f"{prefix.removesuffix('.deltas.')}: adapter {name!r}"
                check_settings(delta, settings, where)  # type: ignore[arg-type]
        self._state_adapters = prefix, set(names.values()) & set(self)

    def _drop_missing_keys(self, _: nn.Module, incompatible: Any) -> None:
        """Removes keys of adapters that are absent from the state dict from the missing keys, so
        that a base model's state dict can be loaded.
        """
        missing, (prefix, names) = incompatible.missing_keys, self._state_adapters
        for key in self._keys_of_base(prefix, missing):
            missing.remove(key)
        loading = self.selection.loading
        if loading is None or loading.missing is not missing:
            loading = self.selection.loading = StateDictLoading(missing)
        loading.add_module(prefix, names)


class Adapted(nn.Module):
    """Mixin of a module with deltas: its original class, its `BaseLayer` class, and its path
    `site`.
    """

    base_class: ClassVar[type[nn.Module]]
    layer_class: ClassVar[type[BaseLayer]]
    deltas: Deltas
    selection: Selection
    site = ""

    def layer(self, *names: str, base: BaseLayer | None = None) -> Layer:
        """Returns the module as a layer with the named deltas on top, in the given order. Names
        without a delta on this module are ignored.
        """
        layer: Layer = base or self.layer_class(self)
        for name in names:
            if name in self.deltas:
                layer = Over(self.deltas[name], layer)  # type: ignore[arg-type]
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, (adapted_class, self.base_class, self.layer_class), self.__dict__


def renamed_subclass(mixin: type, cls: type[nn.Module], forward: Any, **body: Any) -> Any:
    """Returns a subclass of `cls` with another forward. It has the name of `cls`, because model
    files record the class name.
    """
    body["forward"] = functools.wraps(cls.forward)(forward)
    subclass = type(cls.__name__, (mixin, cls), body)
    subclass.__module__, subclass.__qualname__ = cls.__module__, cls.__qualname__
    return subclass


def blank(make_class: Any, *args: Any) -> Any:
    """Creates an uninitialized object of the class that `make_class` returns; pickle calls this."""
    cls = make_class(*args)
    return cls.__new__(cls)


@functools.cache
def adapted_class(cls: type[nn.Module], layer_class: type[BaseLayer]) -> type[Adapted]:
    def forward(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer(*self.selection.names_for_call(self.training))
        if isinstance(layer, BaseLayer):
            return layer(*args, **kwargs)
        return layer_class.called(layer, *args, **kwargs)

    served = {name: WeightDescriptor(name) for name in NAMES if not hasattr(cls, name)}
    own = {"base_class": cls, "layer_class": layer_class}
    return renamed_subclass(Adapted, cls, forward, **own, **served)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a model (tensors of any shape) without its adapters."""
    token = _without_deltas.set(True)
    try:
        state = model.state_dict()
    finally:
        _without_deltas.reset(token)
    return state


def deltas_on(module: nn.Module, names: Iterable[str]) -> list[Delta]:
    if not isinstance(module, Adapted):
        return []
    return [module.deltas[name] for name in names if name in module.deltas]  # type: ignore[misc]


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Adapted))


def selection_of(model: nn.Module) -> Selection:
    """Returns the model's selection. If parts of the model were adapted before they were joined,
    their selections are merged.
    """
    selections = list({id(m.selection): m.selection for _, m in adapted_modules(model)}.values())
    first, *others = selections or [Selection()]
    for other in others:
        if clash := set(first.names) & set(other.names):
            raise LorafoldError(
                "two parts of this model have adapters with the same name:"
                f" {listed(sorted(clash))}; detach one of them"
            )
        first.names += other.names
        first.origins |= other.origins
        first.frozen += other.frozen
    if others:
        for _, m in adapted_modules(model):
            m.selection = m.deltas.selection = first
    return first


def attach_delta(
    module: nn.Module, layer_class: type[BaseLayer], name: str, delta: Delta, selection: Selection,
    site: str = "",
) -> None:  # fmt: skip
    """Attaches a delta to the module at path `site`, on top of the module's other deltas."""
    if not isinstance(module, Adapted):
        if hasattr(module, "deltas"):
            raise LorafoldError(
                f"{site or type(module).__name__}: the module has its own attribute `deltas`,"
                " which adapters use; leave the module out of the targets"
            )
        deltas, swapped = Deltas(selection), adapted_class(type(module), layer_class)  # type: ignore
        module.__class__ = swapped
        assert isinstance(module, Adapted)
        module.deltas, module.selection, module.site = deltas, selection, site
        layer_class.entered(module)
    module.deltas[name] = delta.train(module.training)


def detach_delta(module: Adapted, name: str) -> None:
    """Detaches a delta. A module without deltas gets its original class back."""
    del module.deltas[name]
    if not len(module.deltas):
        del module.deltas, module.selection
        module.__dict__.pop("site", None)
        layer_class = module.layer_class
        module.__class__ = module.base_class  # type: ignore[assignment]
        layer_class.left(module)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Freezes the base. The selection records the parameters that were trainable, so that detaching
    can unfreeze them.
    """
    of_deltas = {id(p) for m in model.modules() if isinstance(m, Deltas) for p in m.parameters()}
    for p in model.parameters():
        if p.requires_grad and id(p) not in of_deltas:
            p.requires_grad_(False)
            selection.frozen.append(p)


class only:
    """Context manager: only the named adapters are active, stacked in the given order.

    For example, `with only(model, "sft"): ...`. Under `only(model)`, the outputs equal those of the
    base model bit for bit, unless an adapter trains the base weights.

    The active adapters are a property of the model, so every thread that uses the model sees them.
    A block that gradient checkpointing recomputes in the backward pass runs with the adapters of
    its forward pass.

    Raises LorafoldError for an adapter that is not attached, and on entry while another thread or
    task is inside such a block on the same model.
    """

    def __init__(self, model: nn.Module, *names: str) -> None:
        attached_names = {name for _, m in adapted_modules(model) for name in m.deltas}
        if unknown := [n for n in names if n not in attached_names]:
            raise LorafoldError(
                f"no adapter {listed(unknown, max_chars=80)} is attached to this model; attached"
                f" adapters: {listed(sorted(attached_names), max_chars=120) or 'none'}"
            )
        self.selection, self.names = selection_of(model), names
        self._entries: list[OnlyBlock] = []

    def __enter__(self) -> None:
        self._entries.append(self.selection.enter(self.names))

    def __exit__(self, *_: object) -> None:
        self.selection.leave(self._entries.pop())
