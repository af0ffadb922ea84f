"""Expert weights as layers, and the forward of a mixture-of-experts module over these layers.

    for a token x, its experts e_1 .. e_k and their weights p_1 .. p_k (from the router):
    y = sum_i p_i down_{e_i} act(gate_up_{e_i} x)
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafold.core.active_adapters import DropoutSite, dropout_site, expert_token_names
from lorafold.core.attach import Adapted, blank, renamed_subclass
from lorafold.core.expert_matrices import (
    BY_INDEX,
    BY_SCORE,
    SORTED_ROWS,
    STORED,
    Matrices,
    expert_parameters,
    experts_layout,
    matrices_of,
    parameter_path,
)
from lorafold.core.layer import BaseLayer, Layer, add
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.layers.expert_storage import ExpertMatrices, stored_matrices
from lorafold.ops.autocast import lowered
from lorafold.ops.dropout import dropout, shared_dropout
from lorafold.ops.grouped import (
    FrozenMatrices,
    Groups,
    frozen_product,
    low_rank_product,
    product,
    sort_into_groups,
)
from lorafold.ops.scale_and_add import scale_and_add


class Experts(BaseLayer):
    """The matrices (E, out, in) of an expert parameter. Its input rows x (S, in) are sorted by
    expert.
    """

    linear = True
    groups: Groups | None = None
    at: Tensor | None = None  # the index (S,) of each row in the tokens' experts (T, k)
    experts: tuple[int, int] = (0, 1)  # T, k

    def __init__(self, module: Matrices, stored: Callable[[], Tensor] | None = None) -> None:
        super().__init__(module, stored)
        self.owner, self.name = module.owner, module.name
        self.storage: ExpertMatrices = stored_matrices(module)
        self.quantized = self.storage.quantized

    @classmethod
    def entered(cls, module: nn.Module) -> None:
        assert isinstance(module, Matrices)
        run_over_layers(module.routed)
        module.owner._modules[module.name] = module

    @classmethod
    def left(cls, module: nn.Module) -> None:
        assert isinstance(module, Matrices)
        del module.owner._modules[module.name]
        restore_forward(module.routed)

    @property
    def rows(self) -> Groups:
        if self.groups is None:
            raise LorafoldError(
                f"{self.name}: found no rows sorted by expert; only the module of the experts may"
                " call this layer"
            )
        return self.groups

    def frozen_matrices(self) -> FrozenMatrices:
        """Returns the experts' matrices (out, in), for a matmul with the current rows."""
        matrix, every = self.storage.matrix, self.storage.dense
        return FrozenMatrices(
            lambda e, dtype: matrix(e).to(dtype), lambda dtype: every().to(dtype), self.rows
        )

    @property
    def frozen(self) -> bool:
        return not self.storage.parameter.requires_grad

    @property
    def device(self) -> torch.device:
        return self.storage.parameter.device

    @property
    def matrices(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.storage.shape[:1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.storage.shape[1:]

    def parameter(self, name: str) -> Any:
        return self.owner._parameters.get(parameter_path(self.module, self.name, name))

    @property
    def bias(self) -> Tensor | None:
        return self.parameter("bias")

    def sources(self) -> list[Tensor] | None:
        return [t for t in (self.storage.parameter, self.bias) if t is not None]

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.storage.dense(), self.bias

    def dense_like(self) -> tuple[Tensor, Tensor | None]:
        return self.storage.dense_like(), None if self.bias is None else self.bias.to("meta")

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        b = None if self.bias is None else self.each(self.bias).to(x.dtype)
        if self.frozen:
            return add(frozen_product(x, onto, self.frozen_matrices(), self.shape[0]), b)
        return add(add(product(x, self.storage.dense(), self.rows), onto), b)

    def op(self, x: Tensor, m: Tensor) -> Tensor:
        return product(x, m, self.rows)

    def branch(self, x: Tensor, down: Tensor, up: Tensor, p: float) -> Tensor:
        return self.op(self.op(self.drop(x, p), down), up)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropout(x, p, self.site()) if p else x

    def site(self) -> DropoutSite | None:
        """Returns the inputs of dropout's random numbers for the rows, or None if dropout uses
        torch's generator.
        """
        (tokens, k), at = self.experts, self.at
        if at is None:
            return None
        return dropout_site(self.module, tokens, lambda names: expert_token_names(names, at, k))

    def each(self, v: Tensor) -> Tensor:
        return v[self.rows.of_row]

    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        parts = [
            scale_and_add(
                y[at], g[e], None if c is None else c[e], None if onto is None else onto[at]
            )
            for e, at in self.rows.spans()
        ]
        return torch.cat(parts) if parts else y

    def low_rank(
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None, k: float = 1.0
    ) -> Tensor:
        if not self.frozen or onto is not None:
            return super().low_rank(x, down, up, p, onto, k)
        drop = shared_dropout(x, p, id(self.module), self.site()) if p else None
        y = low_rank_product(x, self.frozen_matrices(), down, up, drop, k)
        return y if self.bias is None else y + self.each(self.bias).to(y.dtype)

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        if self.quantized:
            raise NotMergeable(
                "these experts store quantized weights, in which a change would be lost to"
                " rounding; dequantize the weights first"
            )
        stored = self.storage.as_stored(w)
        return {"weight": stored} if b is None else {"weight": stored, "bias": b}

    def plain(self) -> Experts:
        twin = copy.copy(self)
        twin.quantized = False
        return twin

    def write(self, w: Tensor, b: Tensor | None) -> None:
        encoded = self.encode(w, b)
        with torch.no_grad():
            self.storage.parameter.copy_(encoded["weight"])
            if b is not None and self.bias is not None:
                self.bias.copy_(b)

    def dequantize(self) -> None:
        if self.quantized:
            dense = self.storage.as_stored(self.storage.dense()).contiguous()
            for name in self.storage.names:
                del self.owner._parameters[name]
            self.owner._parameters[self.name] = nn.Parameter(dense, requires_grad=False)
            self.storage, self.quantized = stored_matrices(self.module), False  # type: ignore[arg-type]
            restore_forward(self.module.routed)  # type: ignore[arg-type]


class Routed(nn.Module):
    """Mixin: a module whose forward runs over the `Experts` layers of its own parameters or a
    child's.
    """

    base_class: ClassVar[type[nn.Module]]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        within, holder = _holder(self)
        for name in [n for n, m in holder._modules.items() if isinstance(m, Matrices)]:
            stored, plain = f"{prefix}{within}{name}{STORED}.", f"{prefix}{within}{name}."
            for key in [key for key in state_dict if key.startswith(stored)]:
                state_dict[plain + key.removeprefix(stored)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, (routed_class, self.base_class), self.__dict__


@functools.cache
def routed_class(cls: type[nn.Module]) -> type[Routed]:
    return renamed_subclass(Routed, cls, forward, base_class=cls)


def _holder(routed: nn.Module) -> tuple[str, nn.Module]:
    """Returns a path prefix and the module that holds the expert parameters: "" and `routed`, or
    "NAME." and its child.
    """
    if expert_parameters(routed):
        return "", routed
    children = routed._modules.items()
    return next((f"{name}.", m) for name, m in children if m and expert_parameters(m))


def run_over_layers(routed: nn.Module) -> None:
    """Makes the module's forward run over `Experts` layers, which deltas and quantized matrices
    need.
    """
    if not isinstance(routed, Routed):
        routed.__class__ = routed_class(type(routed))  # type: ignore[arg-type]


def restore_forward(routed: nn.Module) -> None:
    """Restores the module's own forward, unless a delta or a quantized matrix is left."""
    matrices = matrices_of(_holder(routed)[1], routed).values()
    needed = any(isinstance(m, Adapted) or stored_matrices(m).quantized for m in matrices)
    if isinstance(routed, Routed) and not needed:
        routed.__class__ = routed.base_class  # type: ignore[assignment]


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the module's own forward if no delta is active and nothing is quantized, else the
    `Experts` layers.
    """
    _, holder = _holder(self)
    parameters = matrices_of(holder, self)
    adapted = [m for m in parameters.values() if isinstance(m, Adapted)]
    names = adapted[0].selection.names_for_call(self.training) if adapted else ()
    active = any(n in m.deltas for m in adapted for n in names)
    if not active and not any(stored_matrices(m).quantized for m in parameters.values()):
        return self.base_class.forward(self, *args, **kwargs)

    def layers(groups: Groups, at: Tensor | None, experts: tuple[int, int]) -> list[Layer]:
        result = []
        for matrices in parameters.values():
            base = Experts(matrices)
            base.groups, base.at, base.experts = groups, at, experts
            over = isinstance(matrices, Adapted)
            result.append(matrices.layer(*names, base=base) if over else base)  # type: ignore
        return result

    called = FORWARDS[next(iter(parameters.values())).form.called]
    return called(self, holder, layers, *args, **kwargs)


# makes the layers for groups of rows, given the index (S,) of each row in the tokens' experts
# (T, k), if known, and T, k
Layers = Callable[[Groups, Tensor | None, tuple[int, int]], list[Layer]]


def run_selected(
    routed: Any, holder: nn.Module, layers: Layers, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Returns the experts' outputs, weighted and summed for each token, in the shape of `hidden`,
    which has T tokens. The other arguments are the tokens' experts (T, k) and weights (T, k).
    """
    index, weights = (*args, *kwargs.values())
    tokens = hidden.reshape(-1, hidden.shape[-1])
    mixed = lowered(functools.partial(_expert_outputs, holder, layers, index), tokens)
    return (mixed * weights[..., None]).sum(1).to(hidden.dtype).view(hidden.shape)


def run_scaled(
    routed: Any, holder: nn.Module, layers: Layers, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the output (T, hidden) of the experts plus the shared expert, and the router's
    logits. The router's scores scale the inputs.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    scores, logits = routed.router(tokens)
    weights, index = scores.topk(routed.top_k, 1)
    mixed = lowered(functools.partial(_expert_outputs, holder, layers, index), tokens, weights)
    shared = routed.shared_expert(tokens)
    return shared + mixed.sum(1).to(shared.dtype), logits


def run_sorted(
    routed: Any, holder: nn.Module, layers: Layers, rows: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Multiplies each row (S, in) by the matrix of its expert: (S, out)."""
    each, count = torch.tensor(sizes), len(rows)  # the sum, which fake tensors don't have
    of = torch.arange(len(sizes)).repeat_interleave(each, output_size=count).to(rows.device)
    groups, taken, places = sort_into_groups(of, len(sizes))
    (layer,) = layers(groups, None, (0, 1))
    return lowered(lambda x: layer(x[taken]).index_select(0, places), rows)


FORWARDS: dict[str, Any] = {BY_INDEX: run_selected, BY_SCORE: run_scaled, SORTED_ROWS: run_sorted}


def _expert_outputs(
    holder: Any, layers: Layers, index: Tensor, hidden: Tensor, weights: Tensor | None = None
) -> Tensor:  # (T, k, hidden)
    """Returns the output of each expert of each token, with inputs scaled by `weights` (T, k)."""
    form = experts_layout(holder)
    assert form is not None
    (tokens, k), stored = index.shape, next(iter(form.parameters.values()))
    number = int(getattr(holder, stored.number))
    groups, rows, places = sort_into_groups(index.reshape(-1), number)
    x = hidden.index_select(0, rows // k)  # its backward is faster than with indexing
    if weights is not None:
        x = x * weights.reshape(-1, 1).index_select(0, rows)
    *firsts, last = layers(groups, rows, (tokens, k))
    u = [first(x) for first in firsts]
    if form.activation:
        gate, up = u if len(u) == 2 else u[0].chunk(2, -1)
        inner = getattr(holder, form.activation)(gate) * up
    else:
        inner = holder._apply_gate(*u) if holder.has_gate else holder.act_fn(*u)
    y = last(inner)
    if getattr(holder, "has_post_expert_norm", False):
        y = holder.post_expert_norm(y)
    return y.index_select(0, places).view(tokens, k, -1)
