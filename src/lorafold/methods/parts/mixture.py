"""A mixture of frozen adapters under learned gates.

    y = W x + sum_i g_i B_i A_i x       B_i (out, r_i), A_i (r_i, in) frozen and laid end to end; g
                                        (n,) learned, 1/n at start

    global      one g for the whole adapter, as LoRAHub has it (Huang et al. 2023, arXiv 2307.13269)
    layer       a g for every adapted layer, as MoLE has it for every block (Wu et al. 2024, arXiv
                2404.13628)
    token       g = softmax(R x), R (n, in) zero at start: every adapted layer routes every token by
                its own input

Under global and layer gates it is a low-rank change as any other, which folds and composes; routed
by tokens it has no form in weight space. An adapter that has nothing at a layer has no columns
there. Made by `lorafold compose --how mixture`, which then trains the gates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.delta import Delta, LowRank, Opaque
from lorafold.core.layer import Layer, add
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError

# the key, in the file, of the gates that an adapter has for all its layers
GATES = "base_model.mixture_gates"
Gating = Literal["global", "layer", "token"]


class Gates(nn.Module):
    """values (n,), fp32: a module, so that the deltas of an adapter can have one and the same.

    `shared`: they do.
    """

    def __init__(self, n: int, shared: bool, device: torch.device) -> None:
        super().__init__()
        self.shared = shared
        self.values = nn.Parameter(torch.full((n,), 1 / n, device=device, dtype=torch.float32))


def lay_frozen(delta: nn.Module, shape: tuple[int, int], device: torch.device) -> None:
    """Room for the factors: up (out, R), down (R, in), fp32, and owner (R,) int64, the adapter that
    each column is of.
    """
    delta.register_buffer("up", torch.zeros(shape[0], 0, device=device, dtype=torch.float32))
    delta.register_buffer("down", torch.zeros(0, shape[1], device=device, dtype=torch.float32))
    delta.register_buffer("owner", torch.zeros(0, device=device, dtype=torch.int64))


class MixtureDelta(LowRank):
    """The factors under gates that hold for all tokens.

    `gates` are its own, or those of the delta that they are shared with.
    """

    gates: Gates
    up: Tensor
    down: Tensor
    owner: Tensor

    def __init__(self, shape: tuple[int, int], n: int, shared: bool, device: torch.device) -> None:
        super().__init__()
        self.n = n
        self.gates = Gates(n, shared, device)
        lay_frozen(self, shape, device)

    def share(self, gates: Gates) -> None:
        """Take another delta's gates.

        They stay that one's parameters, so that they are trained, counted and saved once.
        """
        del self.gates
        object.__setattr__(self, "gates", gates)

    def borrowed(self) -> Iterable[nn.Parameter]:
        return self.gates.parameters()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up * self.gates.values.to(self.up.device)[self.owner], self.down


class RoutedDelta(Opaque):
    """The factors under gates that a router (n, in), fp32, gives each token."""

    up: Tensor
    down: Tensor
    owner: Tensor

    def __init__(self, shape: tuple[int, int], n: int, device: torch.device) -> None:
        super().__init__()
        self.n = n
        self.router = nn.Parameter(torch.zeros(n, shape[1], device=device, dtype=torch.float32))
        lay_frozen(self, shape, device)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        gates = layer.op(x, self.router).float().softmax(-1)  # (..., n)
        u = layer.op(x, self.down)  # (..., R)
        u = u * gates[..., self.owner].to(u.dtype)
        return layer(x, onto=add(F.linear(u, self.up.to(u.dtype)), onto))


@dataclass(frozen=True)
class Mixture(Spec):
    """adapters: the names of those that are mixed, in the order of their gates; gates: global,
    layer or token.

    What it builds is empty until it is filled: by `compose`, or from a file. LorafoldError for no
    adapters or unknown gates.
    """

    adapters: tuple[str, ...]
    gates: Gating = "global"

    lr: ClassVar[float] = 2e-2

    def __post_init__(self) -> None:
        wrong = [] if self.adapters else ["adapters: found none, expected at least one"]
        if self.gates not in get_args(Gating):
            wrong.append(f"gates {self.gates!r} ({', '.join(get_args(Gating))})")
        if wrong:
            raise LorafoldError(f"Mixture: {'; '.join(wrong)}")

    def build(self, layer: Layer) -> MixtureDelta | RoutedDelta:
        n, device = len(self.adapters), layer.device
        if self.gates == "token":
            return RoutedDelta(layer.shape, n, device)
        return MixtureDelta(layer.shape, n, self.gates == "global", device)

    def join(self, deltas: Mapping[str, Delta]) -> None:
        if self.gates == "global":
            first, *others = deltas.values()
            for delta in others:
                delta.share(first.gates)  # type: ignore[operator]
