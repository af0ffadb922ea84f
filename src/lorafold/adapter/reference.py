"""The reference of a preference or policy loss: the model without the trained adapters.

DPO, KTO and GRPO compare the model with a frozen copy. TRL loads this copy by the model's name,
without the frozen adapters below the trained one. `reference` includes these adapters and takes no
memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self, TypeVar

from torch import nn

from lorafold.core.attach import adapted_modules, only, renamed_subclass, selection_of
from lorafold.core.contexts import evaluating
from lorafold.errors import LorafoldError

Model = TypeVar("Model", bound=nn.Module)
# attributes that a trainer sets on the model, and that the reference must not copy
TRAINER_ATTRIBUTES = ("forward", "_original_forward", "_is_accelerate_prepared")


def reference(model: Model) -> Model:
    """The model without its trainable adapters, for TRL's `ref_model`: an object of the model's
    class that shares the model's weights, so it takes no memory.

    Calling the reference, its forward or a part of it (`reference(model).model`) runs the model in
    evaluation mode, without gradients, with only the frozen active adapters. Training mode and
    gradients can't be switched on. Raises LorafoldError if no active adapter is trainable, or if
    one trains the base weights.

    Args:
        model: the model, with a trainable adapter attached.
    """
    under = frozen_adapters(model)
    selection_of(model).reference_names = under
    return _reference_to(model, model, under)


def frozen_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the active frozen adapters, lowest first.

    Raises LorafoldError if no active adapter is trainable, or if one trains the base weights.
    """
    names = selection_of(model).names
    deltas: list[tuple[str, Any]] = [
        (name, delta) for _, m in adapted_modules(model) for name, delta in m.deltas.items()
    ]
    parts = [(name, part) for name, delta in deltas for part in delta.parts()]
    trained = {name for name, delta in deltas if any(p.requires_grad for p in delta.parameters())}
    if not trained & set(names):
        raise LorafoldError(
            "reference: found no active trainable adapter, expected at least one, because otherwise"
            " the model is its own reference; attach one, or load it with trainable=True"
        )
    if moved := {name for name, part in parts if part.in_place} & trained:
        raise LorafoldError(
            f"reference: adapter {', '.join(sorted(moved))} trains the base's own weights, so the"
            " original weights are gone; load the reference as a second model"
        )
    return tuple(name for name in names if name not in trained)


def _reference_to(module: nn.Module, model: nn.Module, under: tuple[str, ...]) -> Any:
    """The reference of a module of the model (or of the model itself), which runs with the adapters
    `under`.
    """
    twin = object.__new__(_reference_class(type(module)))  # type: ignore[arg-type]
    state = {name: value for name, value in vars(module).items() if name not in TRAINER_ATTRIBUTES}
    twin.__dict__.update(state, _reference_of=(module,), _model=(model,), _under=under, _parts={})
    return twin


class _Reference(nn.Module):
    """Mixin for the class of a module, which makes it run with only the adapters `_under`."""

    _reference_of: tuple[Any]  # a tuple, so that it is not a submodule
    _model: tuple[Any]
    _under: tuple[str, ...]
    _parts: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with only(self._model[0], *self._under), evaluating(self._reference_of[0]):
            return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if not isinstance(value, nn.Module):
            return value
        part = self._parts.get(name)
        if part is None or part._reference_of[0] is not value:
            part = self._parts[name] = _reference_to(value, self._model[0], self._under)
        return part

    def __setattr__(self, name: str, value: Any) -> None:
        # submodules belong to the model, so they must not be parts of the reference
        own = value._reference_of[0] if isinstance(value, _Reference) else value
        super().__setattr__(name, own)

    def train(self, mode: bool = True) -> Self:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise LorafoldError("a reference can't be copied or pickled; copy or pickle the model")


@cache
def _reference_class(cls: type[nn.Module]) -> type[_Reference]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        [module], [model] = self._reference_of, self._model
        with only(model, *self._under), evaluating(module):
            return module.forward(*args, **kwargs)  # a trainer may have replaced it

    return renamed_subclass(_Reference, cls, forward)
