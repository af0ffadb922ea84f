"""A delta is middleware for one layer, and the same change seen in weight space.

    delta(layer, x)     what the adapted layer computes; layer(x) runs whatever lies beneath
    delta.fold(w, b)    W (out, in), b (out,) | None  ->  the changed W, b, in the wider of the two
                        dtypes

The law: folding then calling equals calling. Where a change has no weight-space form, `fold` raises
`NotMergeable`. Every class here is abstract; every method is a final subclass of one of them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafold.core.layer import Layer, add
from lorafold.core.rounding import rounded
from lorafold.errors import NotMergeable


class Delta(nn.Module, ABC):
    """Abstract: a trainable change of one layer.

    Parameters are fp32 and live on the layer's device.
    """

    up_names: tuple[str, ...] = ()  # parameters that take the up factor's learning rate (LoRA+)
    in_place = False  # its parameters are the module's own, so that nothing lies over them
    # tensors that checkpoints of a run hold and adapter files do not
    run_names: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]: ...

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """up (out, r), every scale included, and down (r, in), where the change is W + up @ down;
        None where it has no factors.
        """
        return None

    def change(self, w: Tensor) -> Tensor:  # (out, in)
        """dW in full: what folding adds to W. NotMergeable as `fold`."""
        return self.fold(w, None)[0] - w

    def parts(self) -> Iterable[Delta]:
        """The deltas this one is made of, in the order they apply: itself, unless it is a
        combinator.
        """
        return (self,)

    def penalty(self) -> Tensor | None:
        """A term the training loss gains at each step, or None."""
        return None

    def borrowed(self) -> Iterable[nn.Parameter]:
        """Parameters of other deltas that this one computes with."""
        return ()

    @property
    def twin(self) -> Delta | None:
        """The delta that makes the very same change of a module whose weight is this one's too, so
        that it can stay shared.
        """
        return None

    def values_at(self) -> Sequence[int]:
        """The rows of the stored weight that folding gives outright, whatever was there, instead of
        changing them.
        """
        return ()


class Opaque(Delta):
    """Abstract: a change with no weight-space form."""

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable(
            f"{type(self).__name__} has no form in weight space, so it can't be merged"
        )


class Additive(Delta):
    """Abstract: W + dW."""

    @abstractmethod
    def delta(self) -> Tensor:  # (out, in), scale included
        ...

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.delta(), b

    def change(self, w: Tensor) -> Tensor:
        return self.delta()

    def row_squares(self, w: Tensor, own: Tensor) -> Tensor:  # (out,)
        """The squared norms of the rows of W + dW (out, in); `own` (out,) are those of W."""
        return torch.linalg.vector_norm(w + self.delta(), dim=1).square()


class Dense(Additive):
    """Abstract: dW must be built anyway, so it is added to W and the layer is one matmul.

    In bf16 the sum is rounded with a dither, which keeps changes under half a unit: 3 GEMMs a step,
    where W x + dW x takes 5. The sum is made again for the backward, so that a step never keeps
    more than one matrix of the model's size.
    """

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._run(layer, x, onto)
        y: Tensor = checkpoint(
            self._run, layer, x, onto, use_reentrant=False, preserve_rng_state=False
        )
        return y

    def _run(self, layer: Layer, x: Tensor, onto: Tensor | None) -> Tensor:
        w, b = layer.dense()
        return add(add(layer.op(x, rounded(w + self.delta(), w.dtype)), onto), b)


class LowRank(Additive):
    """Abstract: a method that is its two factors, nothing more. Dropout lies on the branch only."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:  # up (out, r), down (r, in), scale included
        ...

    def delta(self) -> Tensor:  # (out, in)
        up, down = self.factors()
        return up @ down

    # |w|^2 + 2 b.(A w) + b (A A^T) b for each row, without W + dW
    def row_squares(self, w: Tensor, own: Tensor) -> Tensor:
        up, down = self.factors()
        cross = (w @ down.to(w.dtype).t()).to(up.dtype)  # (out, r)
        return (
            own + torch.linalg.vecdot(up, torch.addmm(cross, up, down @ down.t(), beta=2))
        ).clamp_min(0)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        up, down = self.factors()
        return layer.low_rank(x, down, up, self.dropout if self.training else 0.0, onto)


def alike(a: Delta, b: Delta) -> bool:
    """Do the deltas of two modules that share a weight make the same change of it?"""
    pairs = zip_longest(a.parts(), b.parts())
    return all(x is not None and y is not None and (x.twin is y or y.twin is x) for x, y in pairs)


def on_meta(delta: Delta) -> Delta:
    """A copy of the delta without its values."""
    tensors = [*delta.parameters(), *delta.buffers()]
    return copy.deepcopy(
        delta, {id(t): nn.Parameter(t.to("meta"), requires_grad=False) for t in tensors}
    )


def put(delta: Delta, name: str, value: Tensor) -> None:
    """Give a delta's tensor, by its dotted name, other values: in place, or anew where the shape is
    another one.
    """
    owner, _, leaf = name.rpartition(".")
    module = delta.get_submodule(owner)
    old = getattr(module, leaf)
    if old is not None and old.shape == value.shape:
        with torch.no_grad():
            old.copy_(value)
    elif leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = value.clone()
