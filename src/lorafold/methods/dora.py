"""DoRA: a trained magnitude for every output, on top of any additive change of the weight.

    V = W + dW                      (out, in)
    y = g (V x) + b                 g = m / |V|, m (out,) starting at |W|, |.| the norm of each row,
                                    treated as a constant

Liu et al. 2024, arXiv 2402.09353, eq. 5 and 11 (the norm detached, sec. 4.3). In the paper, dW is
LoRA's update; here it can be the update of any additive method. Use DoRA if LoRA at a small rank
falls short of full fine-tuning; like LoRA, it costs nothing once merged.

For a low-rank dW, the norms are |w|^2 + 2 b.(A w) + b (A A^T) b for each row, with |w|^2 cached, so
a step needs one thin matmul with W for them and does not build V. The base layer runs once, because
y = g (z - b) + b for z = V x + b; this holds with dropout too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.combine import up_names_in
from lorafold.core.contexts import in_backward, scope
from lorafold.core.delta import Additive, Delta, DeltasByPath, Gained
from lorafold.core.layer import Layer, WeightAndBias
from lorafold.core.spec import Losses, Spec
from lorafold.errors import LorafoldError
from lorafold.methods.lora import LoRA


def squared_row_norms(w: Tensor) -> Tensor:  # (*matrices, out, in) -> (*matrices, out)
    """The squared norm of each row of the matrices, in fp32 or wider."""
    return torch.linalg.vector_norm(
        w, dim=-1, dtype=torch.promote_types(w.dtype, torch.float32)
    ).square()


class CachedValue:
    """A value computed from tensors, which is computed again after one of them was replaced, moved
    or modified in place. Copying or pickling it gives an empty cache.
    """

    def __init__(self) -> None:
        self.sources: tuple[Tensor, ...] = ()
        self.state: list[Any] = []
        self.value: Tensor | None = None

    def __reduce__(self) -> tuple[type[CachedValue], tuple[()]]:
        return CachedValue, ()

    def get(
        self, sources: Sequence[Tensor], make: Callable[[], Tensor], during: Any = None
    ) -> Tensor:  # any shape
        """The result of `make`, which is cached as long as `sources` and `during` stay the same."""
        if any(s.is_inference() for s in sources):  # inference tensors have no version counter
            return make()
        state = [during, *((s._version, s.device, s.dtype) for s in sources)]
        same = len(sources) == len(self.sources) and all(
            a is b for a, b in zip(sources, self.sources, strict=True)
        )
        if self.value is None or not same or state != self.state:
            self.sources, self.state, self.value = tuple(sources), state, make()
        return self.value


class DoRADelta(Delta):
    """The magnitude m (*matrices, out), fp32, on top of `inner`, an additive delta.
    """

    vector_names = ("magnitude",)

    def __init__(self, inner: Additive, layer: Layer) -> None:
        super().__init__()
        self.inner = inner
        self.up_names = up_names_in(self)
        self.run_names = tuple(f"inner.{name}" for name in inner.run_names)
        self.own, self.norms = CachedValue(), CachedValue()
        self.during: object | None = None
        self.magnitude = nn.Parameter(squared_row_norms(layer.dense()[0].detach()).sqrt())

    @torch.no_grad()
    def row_norms(self, layer: Layer) -> Tensor:  # (*matrices, out), fp32 or wider
        """The norm of each row of V, with 1 in place of 0.

        Norms are cached until W or the inner delta changes. In training they are cached for one
        optimizer step, in which recomputed (checkpointed) blocks use them again.
        """
        base = layer.sources()

        def base_squares() -> Tensor:
            return squared_row_norms(layer.dense()[0])

        def norms(squares: Tensor) -> Tensor:  # with 1 in place of 0
            return F.threshold(self.inner.row_squares(layer, squares), 0, 1).sqrt_()

        if torch.compiler.is_compiling() or base is None:
            return norms(base_squares())

        if not self.training:
            self.during = None
        elif not in_backward():  # an optimizer may change parameters without changing their version
            self.during = scope() or object()
        tensors = [*base, *self.inner.parameters(), *self.inner.buffers()]
        return self.norms.get(tensors, lambda: norms(self.own.get(base, base_squares)), self.during)

    def gained(self, layer: Layer) -> Gained:
        b, g = layer.bias, self.magnitude / self.row_norms(layer)
        return Gained(self.inner, g, None if b is None else b * (1 - g))

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        with layer.reading_once():
            _, g, c = self.gained(layer)
            z = self.inner(layer, x)
        return layer.scale(z, g, c, onto)

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        v, b = self.inner.fold(w, b)
        norms = torch.linalg.vector_norm(v.detach(), dim=-1)
        return (self.magnitude / F.threshold(norms, 0, 1))[..., None] * v, b


@dataclass(frozen=True)
class DoRA(Spec):
    """DoRA: a magnitude per output on top of an additive method.

    `make_spec` passes all other options on to `over`: `make_spec("dora", rank=8)`,
    `make_spec("dora", over="loha", rank=8)`.

    Args:
        over: the spec of the additive change below the magnitude. Adapters can be saved for LoRA,
            AdaLoRA, LoHa, LoKr, OLoRA, PiSSA and VeRA.
    """

    over: Spec = field(default_factory=LoRA)

    lr_b = 3e-3

    @property
    def asks_losses(self) -> bool:  # type: ignore[override]
        return self.over.asks_losses

    def options(self) -> tuple[str, ...]:
        return (*super().options(), *self.over.options())

    def at(self, path: str) -> Self:
        return replace(self, over=self.over.at(path))

    def build(self, layer: Layer) -> DoRADelta:
        inner = self.over.build(layer)
        if not isinstance(inner, Additive):
            raise LorafoldError(
                f"DoRA: over: found {type(self.over).__name__}, expected an additive method, such"
                " as LoRA or LoHa"
            )
        return DoRADelta(inner, layer)

    def join(self, deltas: DeltasByPath) -> None:
        self.over.join(inner_deltas(deltas))

    def prepare(self, deltas: DeltasByPath, losses: Losses) -> None:
        self.over.prepare(inner_deltas(deltas), losses)

    def penalty(self, deltas: DeltasByPath) -> Tensor | None:
        return self.over.penalty(inner_deltas(deltas))

    def after_step(self, deltas: DeltasByPath, step: int, total: int) -> None:
        self.over.after_step(inner_deltas(deltas), step, total)

    def report(self, deltas: DeltasByPath) -> str:
        return self.over.report(inner_deltas(deltas))


def inner_deltas(deltas: DeltasByPath) -> dict[str, Delta]:
    """The additive deltas inside DoRA's deltas, by module path."""
    return {path: delta.inner for path, delta in deltas.items()}  # type: ignore[misc]
