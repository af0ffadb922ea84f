"""A layer is what a delta sees of a module: it can be run and, if it is linear, read as a matrix.

    layer(x)            its output, by the module's own kernel: (..., in) -> (..., out)
    layer(x, onto=d)    the same, accumulated onto d before the one rounding; a bias is added after
                        that rounding
    layer.op(x, m)      the product of its input and any m (k, in): (..., in) -> (..., k)
    layer.dense()       W (out, in), b (out,) | None

A layer under a delta is a layer (`Over`), and so is a layer whose output is known (`Given`).
Therefore stacks and combinators need no special case. How a module stores its matrix is known only
to the subclasses of `Base` in `lorafold.bases`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.core.delta import Delta


def add(a: Tensor, b: Tensor | None) -> Tensor:
    """a + b, of any shapes that broadcast; a where b is None."""
    return a if b is None else a + b


def bare(module: nn.Module) -> nn.Module:
    """The module as it is without deltas: an object of its own class with the same state, whose
    `weight` and `bias` are the stored ones (`lorafold.core.served_weights`).
    """
    cls: type[nn.Module] | None = getattr(type(module), "base_class", None)
    if cls is None or not ("weight" in module._parameters or "bias" in module._parameters):
        return module
    twin: nn.Module = object.__new__(cls)
    if torch.compiler.is_compiling():  # torch before 2.13 can't trace that one dict is set
        for name, value in module.__dict__.items():
            object.__setattr__(twin, name, value)
        return twin
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


class Layer(ABC):
    """Abstract: anything that a delta can be attached to."""

    __call__: Callable[..., Any]  # (x, onto=None) for a matrix, else as the module's own forward

    @abstractmethod
    def op(self, x: Tensor, m: Tensor) -> Tensor:
        """The product of this layer's input x (..., in) and m (k, in): (..., k), without a bias.

        An embedding's x holds ids (...), and the product is a look-up. Raises NotMergeable if the
        layer is no matrix.
        """

    @abstractmethod
    def drop(self, x: Tensor, p: float) -> Tensor:
        """x (..., in) after dropout with probability p; ids (...) are returned as they are."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in) in the dtype of computation and b (out,) or None, with the deltas below
        folded in. Raises NotMergeable if there is no weight, or if one of these deltas does.
        """

    @property
    def bias(self) -> Tensor | None:  # (out,)
        """The bias (out,) of `dense`, or None."""
        return self.dense()[1]

    def original(self) -> Tensor:  # (out, in)
        """W (out, in) as it was before quantization, with the deltas below folded in; the W of
        `dense` if it was never quantized.

        Raises LorafoldError if it is not known.
        """
        return self.dense()[0]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in). Raises NotMergeable if the layer is no matrix."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module at the bottom."""

    @property
    def device(self) -> torch.device:
        """The device of the module, which the parameters of its deltas share: that of its
        parameters, or of its buffers if it has no parameter.

        Raises LorafoldError if it has neither.
        """
        tensors = chain(self.module.parameters(), self.module.buffers())
        if (first := next(tensors, None)) is None:
            raise LorafoldError(
                f"{type(self.module).__name__}: found no parameter and no buffer, expected a module"
                " with a tensor"
            )
        return first.device

    @property
    @abstractmethod
    def takes_ids(self) -> bool:
        """Whether its inputs are ids, as an embedding's are, and not activations."""

    @property
    @abstractmethod
    def has_bias(self) -> bool:
        """Whether the module has a bias of its own."""

    @abstractmethod
    def sources(self) -> list[Tensor] | None:
        """The tensors, of any shape, that `dense` is computed from; None if a delta is among what
        determines it.
        """

    def low_rank(
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None
    ) -> Tensor:
        """self(x) + up down drop(x), the small product first: (..., in) -> (..., out).

        Args:
            x: the input (..., in).
            down: the down factor (r, in).
            up: the up factor (out, r), with every scale in it.
            p: the probability of dropout on the branch.
            onto: a tensor (..., out) that is added before the rounding, or None.
        """
        u = self.op(self.drop(x, p), down)
        return self(x, onto=add(F.linear(u, up.to(u.dtype)), onto))


class Base(Layer):
    """Abstract: the module itself, frozen. `lorafold.bases` has one final subclass per storage."""

    linear = False  # whether it is a matrix applied to activations, as "all-linear" means it
    takes_ids = False

    def __init__(self, module: nn.Module, stored: Callable[[], Tensor] | None = None) -> None:
        self._module, self.stored = module, stored  # `stored`: reads the weight from plain files
        self.bare: Any = bare(module)

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def has_bias(self) -> bool:
        return self._module._parameters.get("bias") is not None

    def sources(self) -> list[Tensor] | None:
        own = chain(self._module._parameters.values(), self._module._buffers.values())
        return [tensor for tensor in own if tensor is not None]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, without any delta."""
        cls = type(self._module)
        return getattr(cls, "base_class", cls).forward(self.bare, *args, **kwargs)

    @abstractmethod
    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """The parameters that would store W (out, in) and b (out,) in the module, by name, in the
        dtypes given. The module is not changed. Raises NotMergeable if it can't store them.
        """

    def dense_like(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in) and b (out,) or None as `dense` gives them, on the meta device."""
        w, b = self.dense()
        return w.to("meta"), None if b is None else b.to("meta")

    def plain(self) -> Base:
        """The layer that this becomes by `dequantize`."""
        return self

    @abstractmethod
    def write(self, w: Tensor, b: Tensor | None) -> None:
        """Store W (out, in) and b (out,) in the module, rounded once to its dtype.

        Raises NotMergeable if the module can't store them.
        """

    def dequantize(self) -> None:
        """Make a quantized module store its matrix in floating point, so that `write` works."""
        return None


class Upon(Layer):
    """Abstract: a layer over another one, with the same input, shape and module."""

    under: Layer

    def op(self, x: Tensor, m: Tensor) -> Tensor:
        return self.under.op(x, m)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return self.under.drop(x, p)

    @property
    def shape(self) -> tuple[int, int]:
        return self.under.shape

    @property
    def takes_ids(self) -> bool:
        return self.under.takes_ids

    @property
    def has_bias(self) -> bool:
        return self.under.has_bias

    @property
    def module(self) -> nn.Module:
        return self.under.module


class Over(Upon):
    """A layer with one delta attached."""

    def __init__(self, delta: Delta, under: Layer) -> None:
        self.delta, self.under = delta, under

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta(self.under, *args, **kwargs)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.delta.fold(*self.under.dense())

    def original(self) -> Tensor:
        return self.delta.fold(self.under.original(), None)[0]

    def sources(self) -> list[Tensor] | None:
        return None


class Given(Upon):
    """A layer whose output y for the input x is known already, so that a combinator runs the layer
    below once. Another input than x, which a delta may have changed, runs it again.
    """

    def __init__(self, under: Layer, y: Tensor, x: Tensor) -> None:
        self.under, self.y, self.x = under, y, x

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if x is self.x:
            return add(self.y, onto)
        y: Tensor = self.under(x, onto=onto)
        return y.to(torch.promote_types(y.dtype, self.y.dtype))

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.under.dense()

    def original(self) -> Tensor:
        return self.under.original()

    def sources(self) -> list[Tensor] | None:
        return self.under.sources()
