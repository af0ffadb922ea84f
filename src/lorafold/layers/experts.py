"""The matrices of experts as a layer, and the forward of a module of experts over such layers.

    for a token x, its experts e_1 .. e_k and their weights p_1 .. p_k (the router's):
    y = sum_i p_i down_{e_i} act(gate_up_{e_i} x)

A delta over `gate_up_proj` or `down_proj` changes a layer (S, in) -> (S, out), S being k times the
tokens. The forms that a module may have are in `core.matrices`, and the forwards over such
layers in `layers.expert_forwards`; the module's own runs where no delta is active and nothing is
quantized.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafold.core.attach import Adapted
from lorafold.core.layer import BaseLayer, Layer, add
from lorafold.core.matrices import STORED, Matrices, expert_parameters, matrices_of, parameter_path
from lorafold.core.selection import DrawSite, site_of, slots
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.layers.expert_forwards import CALLED
from lorafold.layers.expert_matrices import ExpertMatrices, held
from lorafold.ops.dropout import dropout, shared
from lorafold.ops.grouped import FrozenMatrices, Groups, frozen_product, low_rank_product, product
from lorafold.ops.scale import scale


class Experts(BaseLayer):
    """The matrices (E, out, in) of a parameter of experts. Its rows x (S, in) are in the order of
    their experts, which `groups` says.
    """

    linear = True
    groups: Groups | None = None
    at: Tensor | None = None  # of each row its index (S,) in the tokens' experts (T, k)
    experts: tuple[int, int] = (0, 1)  # T, k

    def __init__(self, module: Matrices, stored: Callable[[], Tensor] | None = None) -> None:
        super().__init__(module, stored)
        self.owner, self.name = module.owner, module.name
        self.held: ExpertMatrices = held(module)
        self.quantized = self.held.quantized

    @classmethod
    def entered(cls, module: nn.Module) -> None:
        assert isinstance(module, Matrices)
        route(module.routed)
        module.owner._modules[module.name] = module

    @classmethod
    def left(cls, module: nn.Module) -> None:
        assert isinstance(module, Matrices)
        del module.owner._modules[module.name]
        leave(module.routed)

    @property
    def rows(self) -> Groups:
        """Which rows are of which expert. Raises LorafoldError outside of the experts' forward."""
        if self.groups is None:
            raise LorafoldError(
                f"{self.name}: found no rows sorted by expert, expected to be called by the"
                " module of the experts"
            )
        return self.groups

    def frozen_matrices(self) -> FrozenMatrices:
        """The experts' matrices (out, in), for a product with this forward's rows."""
        one, every = self.held.matrix, self.held.dense
        return FrozenMatrices(
            lambda e, dtype: one(e).to(dtype), lambda dtype: every().to(dtype), self.rows
        )

    @property
    def frozen(self) -> bool:
        """Whether the matrices get no gradient."""
        return not self.held.parameter.requires_grad

    @property
    def device(self) -> torch.device:
        device: torch.device = self.held.parameter.device
        return device

    @property
    def matrices(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.held.shape[:1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.shape[1:]

    def parameter(self, name: str) -> Any:
        return self.owner._parameters.get(parameter_path(self.module, self.name, name))

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.parameter("bias")
        return bias

    def sources(self) -> list[Tensor] | None:
        return [t for t in (self.held.parameter, self.bias) if t is not None]

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.held.dense(), self.bias

    def dense_like(self) -> tuple[Tensor, Tensor | None]:
        return self.held.dense_like(), None if self.bias is None else self.bias.to("meta")

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        b = None if self.bias is None else self.each(self.bias).to(x.dtype)
        if self.frozen:
            return add(frozen_product(x, onto, self.frozen_matrices(), self.shape[0]), b)
        return add(add(product(x, self.held.dense(), self.rows), onto), b)

    def op(self, x: Tensor, m: Tensor) -> Tensor:
        return product(x, m, self.rows)

    def branch(self, x: Tensor, down: Tensor, up: Tensor, p: float) -> Tensor:
        return self.op(self.op(self.drop(x, p), down), up)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropout(x, p, self.site()) if p else x

    def site(self) -> DrawSite | None:
        """What dropout of its rows follows from; None where torch's generator gives it."""
        (tokens, k), at = self.experts, self.at
        if at is None:
            return None
        return site_of(self.module, tokens, lambda names: slots(names, at, k))

    def each(self, v: Tensor) -> Tensor:
        return v[self.rows.of_row]

    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        parts = [
            scale(y[at], g[e], None if c is None else c[e], None if onto is None else onto[at])
            for e, at in self.rows.spans()
        ]
        return torch.cat(parts) if parts else y

    def low_rank(
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None, k: float = 1.0
    ) -> Tensor:
        if not self.frozen or onto is not None:
            return super().low_rank(x, down, up, p, onto, k)
        drop = shared(x, p, id(self.module), self.site()) if p else None
        y = low_rank_product(x, self.frozen_matrices(), down, up, drop, k)
        return y if self.bias is None else y + self.each(self.bias).to(y.dtype)

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        if self.quantized:
            raise NotMergeable(
                "these experts store quantized weights, in which a change would be lost to"
                " rounding; dequantize them first"
            )
        stored = self.held.as_stored(w)
        return {"weight": stored} if b is None else {"weight": stored, "bias": b}

    def plain(self) -> Experts:
        twin = copy.copy(self)
        twin.quantized = False
        return twin

    def write(self, w: Tensor, b: Tensor | None) -> None:
        encoded = self.encode(w, b)
        with torch.no_grad():
            self.held.parameter.copy_(encoded["weight"])
            if b is not None and self.bias is not None:
                self.bias.copy_(b)

    def dequantize(self) -> None:
        if self.quantized:
            dense = self.held.as_stored(self.held.dense()).contiguous()
            for name in self.held.names:
                del self.owner._parameters[name]
            self.owner._parameters[self.name] = nn.Parameter(dense, requires_grad=False)
            self.held, self.quantized = held(self.module), False  # type: ignore[arg-type]
            leave(self.module.routed)  # type: ignore[arg-type]


class Routed(nn.Module):
    """Mixin: a module whose forward runs over `Experts`, its own or those of a child."""

    base_class: ClassVar[type[nn.Module]]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        within, holder = _holder(self)
        for name in [n for n, m in holder._modules.items() if isinstance(m, Matrices)]:
            stored, own = f"{prefix}{within}{name}{STORED}.", f"{prefix}{within}{name}."
            for key in [key for key in state_dict if key.startswith(stored)]:
                state_dict[own + key.removeprefix(stored)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.base_class,), self.__dict__


@functools.cache
def routed_class(cls: type[nn.Module]) -> type[Routed]:
    """The subclass of a class, with its name, whose forward runs over `Experts`."""
    body = {"forward": functools.wraps(cls.forward)(forward), "base_class": cls}
    swapped = type(cls.__name__, (Routed, cls), body)
    swapped.__module__, swapped.__qualname__ = cls.__module__, cls.__qualname__
    return swapped


def _rebuild(cls: type[nn.Module]) -> Routed:
    swapped = routed_class(cls)  # type: ignore[arg-type]
    return swapped.__new__(swapped)


def _holder(routed: nn.Module) -> tuple[str, nn.Module]:
    """The module that has the matrices which a routed module computes with, and what paths in it
    begin with.
    """
    if expert_parameters(routed):
        return "", routed
    return next(
        (f"{name}.", m) for name, m in routed._modules.items() if m and expert_parameters(m)
    )


def route(routed: nn.Module) -> None:
    """Make the forward that computes experts run over `Experts`, as it must with deltas over their
    matrices or with quantized ones.

    Args:
        routed: the module whose forward it is.
    """
    if not isinstance(routed, Routed):
        routed.__class__ = routed_class(type(routed))  # type: ignore[arg-type]


def leave(routed: nn.Module) -> None:
    """Give the module its own forward again, if nothing needs another."""
    own = matrices_of(_holder(routed)[1], routed).values()
    if isinstance(routed, Routed) and not any(
        isinstance(s, Adapted) or held(s).quantized for s in own
    ):
        routed.__class__ = routed.base_class  # type: ignore[assignment]


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What the module computes: by its own forward where nothing is active or quantized, else over
    layers.

    Args:
        self: the module.
        *args, **kwargs: what its own forward takes (`core.matrices`).
    """
    _, holder = _holder(self)
    own = matrices_of(holder, self)
    adapted = [s for s in own.values() if isinstance(s, Adapted)]
    names = adapted[0].selection.running(self.training) if adapted else ()
    active = any(n in s.deltas for s in adapted for n in names)
    if not active and not any(held(s).quantized for s in own.values()):
        return self.base_class.forward(self, *args, **kwargs)
    called = next(iter(own.values())).form.called
    return CALLED[called](self, holder, functools.partial(_layers, own, names), *args, **kwargs)


def _layers(
    own: dict[str, Matrices],
    names: tuple[str, ...],
    groups: Groups,
    at: Tensor | None,
    experts: tuple[int, int],
) -> list[Layer]:
    found: list[Layer] = []
    for matrices in own.values():
        base = Experts(matrices)
        base.groups, base.at, base.experts = groups, at, experts
        found.append(matrices.layer(*names, base=base) if isinstance(matrices, Adapted) else base)
    return found
