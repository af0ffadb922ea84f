"""A mixture of frozen adapters with learned gates (`lorafold lab compose --how mixture`).

    y = W x + sum_i g_i B_i A_i x       B_i (out, r_i), A_i (r_i, in) frozen and concatenated; g
                                        (n,) learned, 1/n at start

    global      one g for the whole adapter, as in LoRAHub (Huang et al. 2023, arXiv 2307.13269)
    layer       one g for every adapted layer; MoLE has one per block (Wu et al. 2024, arXiv
                2404.13628)
    token       g = softmax(R x), R (n, in) zero at start: every adapted layer routes every token by
                its own input

With global or layer gates, a mixture is a low-rank update, which can be merged and composed; with
token gates, it can't be expressed as a change of the weights. If an adapter does not adapt a layer,
it has no columns in that layer's factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.delta import DeltasByPath, Factors, LowRank, Opaque
from lorafold.core.layer import Layer, add
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.common.options_and_init import check, zeros

# the key in the file for the gates that all layers of an adapter share
GATES = "base_model.mixture_gates"
Gating = Literal["global", "layer", "token"]


class Gates(nn.Module):
    """Gate values (n,), fp32, in a module, so that the deltas of an adapter can share them."""

    def __init__(self, n: int, shared: bool, device: torch.device) -> None:
        super().__init__()
        self.shared = shared
        self.values = nn.Parameter(torch.full((n,), 1 / n, device=device, dtype=torch.float32))


def add_factor_buffers(delta: nn.Module, layer: Layer) -> None:
    """Registers empty buffers for frozen factors: up (*matrices, out, R) and down (*matrices, R,
    in), fp32, and owner (R,), int64, the adapter number of each column.
    """
    (out, inn), device = layer.shape, layer.device
    for name, sides in {"up": (out, 0), "down": (0, inn)}.items():
        empty = torch.zeros(*layer.matrices, *sides, device=device, dtype=torch.float32)
        delta.register_buffer(name, empty)
    delta.register_buffer("owner", torch.zeros(0, device=device, dtype=torch.int64))


class MixtureDelta(LowRank):
    """Frozen factors with gates that are the same for all tokens. The gates belong to this delta,
    or to another delta of the adapter.
    """

    gates: Gates
    up: Tensor
    down: Tensor
    owner: Tensor

    def __init__(self, layer: Layer, n: int, shared: bool) -> None:
        super().__init__()
        self.n = n
        self.gates = Gates(n, shared, layer.device)
        add_factor_buffers(self, layer)

    def share(self, gates: Gates) -> None:
        """Uses the gates of another delta, which remain parameters of that delta only, so that they
        are trained, counted and saved once.
        """
        del self.gates
        object.__setattr__(self, "gates", gates)

    def borrowed(self) -> Iterable[nn.Parameter]:
        return self.gates.parameters()

    def factors(self) -> Factors:
        return self.up * self.gates.values.to(self.up.device)[self.owner], self.down


class RoutedDelta(Opaque):
    """Frozen factors with gates that a router (*matrices, n, in), fp32, computes for each token."""

    up: Tensor
    down: Tensor
    owner: Tensor

    def __init__(self, layer: Layer, n: int) -> None:
        super().__init__()
        self.n = n
        self.router = zeros((*layer.matrices, n, layer.shape[1]), layer.device)
        add_factor_buffers(self, layer)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        gates = layer.op(x, self.router).float().softmax(-1)  # (..., n)
        u = layer.op(x, self.down)  # (..., R)
        u = u * gates[..., self.owner].to(u.dtype)
        change = layer.op(u, self.up) if layer.matrices else F.linear(u, self.up.to(u.dtype))
        return layer(x, onto=add(change, onto))


@dataclass(frozen=True)
class Mixture(Spec):
    """A mixture of adapters. `build` returns deltas with empty factors, which are filled when a
    mixture is composed or loaded.

    Args:
        adapters: the names of the adapters to mix, in the order of their gates.
        gates: global (one gate per adapter), layer (one per adapter and layer) or token (computed
            for each token).
    """

    adapters: tuple[str, ...]
    gates: Gating = "global"

    lr = 2e-2

    def __post_init__(self) -> None:
        wrong = ["adapters: found none, expected at least one"] * (not self.adapters)
        check(self, *wrong, one_of={"gates": get_args(Gating)})

    def build(self, layer: Layer) -> MixtureDelta | RoutedDelta:
        n = len(self.adapters)
        if self.gates == "token":
            if not (layer.takes_vectors or layer.takes_ids):
                raise LorafoldError(
                    "Mixture: gates: found token for a module whose inputs are signals or groups"
                    " of vectors, expected global or layer"
                )
            return RoutedDelta(layer, n)
        return MixtureDelta(layer, n, self.gates == "global")

    def join(self, deltas: DeltasByPath) -> None:
        if self.gates == "global":
            first, *others = deltas.values()
            for delta in others:
                delta.share(first.gates)  # type: ignore[operator]
