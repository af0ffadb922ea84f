"""The matrices of experts as a layer, and the forward of a module of experts over such layers.

    for a token x, its experts e_1 .. e_k and their weights p_1 .. p_k (the router's):
    y = sum_i p_i down_{e_i} act(gate_up_{e_i} x)

The tokens are sorted by expert, so that each expert's are one product (`ops.grouped`). A delta over
`gate_up_proj` or `down_proj` changes a layer (S, in) -> (S, out), S being k times the tokens.
The form is that of transformers' experts (`use_experts_implementation`), whose own forward runs
where no delta is active and nothing is quantized.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafold.bases.expert_matrices import ExpertMatrices, held
from lorafold.core.attach import Adapted
from lorafold.core.base import Base
from lorafold.core.draws import DrawSite, site_of, slots
from lorafold.core.layer import Layer, add
from lorafold.core.matrices import STORED, Matrices, matrices_of, parameter_path
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.ops.autocast import lowered
from lorafold.ops.dropout import dropout, shared
from lorafold.ops.grouped import (
    FrozenMatrices,
    Groups,
    frozen_product,
    grouped,
    low_rank_product,
    product,
)
from lorafold.ops.scale import scale


class Experts(Base):
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
        module.owner._modules[module.name] = module
        route(module.owner)

    @classmethod
    def left(cls, module: nn.Module) -> None:
        assert isinstance(module, Matrices)
        del module.owner._modules[module.name]
        leave(module.owner)

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
        return FrozenMatrices(lambda e, dtype: self.held.matrix(e).to(dtype), self.rows)

    @property
    def frozen(self) -> bool:
        """Whether the matrices get no gradient."""
        return not self.held.parameter.requires_grad

    @property
    def device(self) -> torch.device:
        device: torch.device = self.held.parameter.device
        return device

    @property
    def matrices(self) -> tuple[int, ...]:
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
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None
    ) -> Tensor:
        if not self.frozen or onto is not None:
            return super().low_rank(x, down, up, p, onto)
        drop = shared(x, p, id(self.module), self.site()) if p else None
        y = low_rank_product(x, self.frozen_matrices(), down, up, drop)
        return y if self.bias is None else y + self.each(self.bias).to(y.dtype)

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        if self.quantized:
            raise NotMergeable(
                "these experts store quantized weights, in which a change would be lost to"
                " rounding; dequantize them first"
            )
        turned = self.held.turned(w)
        return {"weight": turned} if b is None else {"weight": turned, "bias": b}

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
            dense = self.held.turned(self.held.dense()).contiguous()
            for name in self.held.names:
                del self.owner._parameters[name]
            self.owner._parameters[self.name] = nn.Parameter(dense, requires_grad=False)
            self.held, self.quantized = held(self.module), False  # type: ignore[arg-type]
            leave(self.owner)


class Routed(nn.Module):
    """Mixin: a module of experts whose forward runs over `Experts`."""

    base_class: ClassVar[type[nn.Module]]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in [n for n, m in self._modules.items() if isinstance(m, Matrices)]:
            stored, own = f"{prefix}{name}{STORED}.", f"{prefix}{name}."
            for key in [key for key in state_dict if key.startswith(stored)]:
                state_dict[own + key.removeprefix(stored)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.base_class,), self.__dict__


@functools.cache
def routed_class(cls: type[nn.Module]) -> type[Routed]:
    """The subclass of a class of experts, with its name, whose forward runs over `Experts`."""
    body = {"forward": functools.wraps(cls.forward)(forward), "base_class": cls}
    swapped = type(cls.__name__, (Routed, cls), body)
    swapped.__module__, swapped.__qualname__ = cls.__module__, cls.__qualname__
    return swapped


def _rebuild(cls: type[nn.Module]) -> Routed:
    swapped = routed_class(cls)  # type: ignore[arg-type]
    return swapped.__new__(swapped)


def route(owner: nn.Module) -> None:
    """Make the module of the experts run over `Experts`, as it must with deltas over its matrices
    or with quantized ones.
    """
    if not isinstance(owner, Routed):
        owner.__class__ = routed_class(type(owner))  # type: ignore[arg-type]


def leave(owner: nn.Module) -> None:
    """Give the module of the experts its own forward again, if nothing needs another."""
    own = matrices_of(owner).values()
    if isinstance(owner, Routed) and not any(
        isinstance(s, Adapted) or held(s).quantized for s in own
    ):
        owner.__class__ = owner.base_class  # type: ignore[assignment]


def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output (T, hidden) of the experts: each token's, weighted by the router and summed.

    Args:
        self: the module of the experts.
        *args, **kwargs: the experts of each token (T, k) and their weights (T, k).
    """
    own = matrices_of(self)
    adapted = [s for s in own.values() if isinstance(s, Adapted)]
    names = adapted[0].selection.running(self.training) if adapted else ()
    active = any(n in s.deltas for s in adapted for n in names)
    if not active and not any(held(s).quantized for s in own.values()):
        y: Tensor = self.base_class.forward(self, hidden, *args, **kwargs)
        return y
    index, weights = (*args, *kwargs.values())
    mixed = lowered(functools.partial(_mixed, self, own, names, index), hidden)
    return (mixed * weights[..., None]).sum(1).to(hidden.dtype)


def _mixed(
    self: Any, own: dict[str, Matrices], names: tuple[str, ...], index: Tensor, hidden: Tensor
) -> Tensor:  # (T, k, hidden)
    """The output of each expert of each token."""
    groups, rows, places = grouped(index.reshape(-1), self.num_experts)
    tokens = rows // index.shape[-1]
    routes = rows, (len(index), index.shape[-1])
    first, last = (_layer(s, names, groups, *routes) for s in own.values())
    u = first(hidden.index_select(0, tokens))  # whose backward is faster than that of indexing
    u = last(self._apply_gate(u) if self.has_gate else self.act_fn(u))
    if self.has_post_expert_norm:
        u = self.post_expert_norm(u)
    return u.index_select(0, places).view(*index.shape, -1)


def _layer(
    matrices: Matrices, names: tuple[str, ...], groups: Groups, at: Tensor, experts: tuple[int, int]
) -> Layer:
    base = Experts(matrices)
    base.groups, base.at, base.experts = groups, at, experts
    if not isinstance(matrices, Adapted):
        return base
    return matrices.layer(*names, base=base)
