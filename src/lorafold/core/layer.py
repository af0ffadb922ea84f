"""A layer is what a delta sees of a module: it can be run and, if it is linear, read as a matrix.

    layer(x)            its output, by the module's own kernel: (..., in) -> (..., out)
    layer(x, onto=d)    the same, accumulated onto d before the one rounding; a bias is added after
                        that rounding
    layer.op(x, m)      the product of its input and any m (k, in): (..., in) -> (..., k)
    layer.dense()       W (out, in), b (out,) | None

A layer may have several matrices of one shape, of which each row of its input meets one: those of
experts. Then W is (E, out, in), and so is whatever a delta has for each matrix.

A layer under a delta is a layer (`delta.Over`), and so is a layer whose output is known
(`combine.Given`). Therefore stacks and combinators need no special case. The layer at the bottom is
the module itself, frozen (`BaseLayer`). How a module stores its matrix is known only to the
subclasses of `BaseLayer` in `lorafold.layers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.contexts import recomputed
from lorafold.core.rounding import rounded, scatter_added
from lorafold.errors import LorafoldError


def add(a: Tensor, b: Tensor | None) -> Tensor:
    """a + b, of any shapes that broadcast; a where b is None."""
    return a if b is None else a + b


class Layer(ABC):
    """Abstract: anything that a delta can be attached to."""

    __call__: Callable[..., Any]  # (x, onto=None) for a matrix, else as the module's own forward
    module: nn.Module  # the module at the bottom
    matrices: tuple[int, ...] = ()  # the number of matrices, (E,), or () for one
    # the columns of W that belong to one input channel: the places of a convolution's window
    window: int = 1
    takes_ids: bool = False  # whether its inputs are ids, as an embedding's are

    @abstractmethod
    def op(self, x: Tensor, m: Tensor) -> Tensor:
        """The product of this layer's input x (..., in) and m (k, in): (..., k), without a bias.

        An embedding's x holds ids (...), and the product is a look-up. Raises NotMergeable if the
        layer is no matrix.
        """

    def op_once(self, x: Tensor, m: Tensor) -> Tensor:
        """`op` of x (..., in) and the first `in` columns of a frozen m (k, in or more): (..., k).

        Layers that read the same x with the same m may compute it once.
        """
        return self.op(x, m[..., : self.shape[1]])

    @abstractmethod
    def drop(self, x: Tensor, p: float) -> Tensor:
        """x (..., in) after dropout with probability p; ids (...) are returned as they are."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in) in the dtype of computation and b (out,) or None, with the deltas below
        folded in. Raises NotMergeable if there is no weight, or if one of these deltas does.
        """

    @abstractmethod
    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """g * y + c + onto (..., k), summed in fp32 and rounded once.

        Args:
            y: an input or an output (..., k) of the layer.
            g: the gains (*matrices, k).
            c: offsets (*matrices, k), or None.
            onto: a tensor that broadcasts to y, or None.
        """

    def each(self, v: Tensor) -> Tensor:
        """Vectors v (*matrices, k), one for each matrix, in a form that broadcasts to outputs
        (..., k) of the layer.
        """
        return v

    @property
    def bias(self) -> Tensor | None:  # (*matrices, out)
        """The bias (*matrices, out) of `dense`, or None."""
        return self.dense()[1]

    def reading_once(self) -> AbstractContextManager[object]:
        """Until the `with` block ends, W is dequantized once, if it is quantized."""
        return nullcontext()

    def weight_times(self, m: Tensor) -> Tensor:  # (*matrices, out, k)
        """W m^T `(*matrices, out, k)` of a factor m `(*matrices, k, in)`, in m's dtype."""
        w = self.dense()[0]
        return (w @ m.to(w.dtype).mT).to(m.dtype)

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
    def takes_vectors(self) -> bool:
        """Whether its inputs are vectors (..., in), which a method may take apart."""
        return not self.takes_ids

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
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None, k: float = 1.0
    ) -> Tensor:
        """self(x) + k up down drop(x), the small product first: (..., in) -> (..., out).

        Args:
            x: the input (..., in).
            down: the down factor (r, in).
            up: the up factor (out, r).
            p: the probability of dropout on the branch.
            onto: a tensor (..., out) that is added before the rounding, or None.
            k: a factor, which up is multiplied with before any rounding.
        """
        return self(x, onto=add(self.branch(x, down, up if k == 1.0 else k * up, p), onto))

    def branch(self, x: Tensor, down: Tensor, up: Tensor, p: float) -> Tensor:
        """up down drop(x), the small product first: (..., in) -> (..., out).

        Args:
            x: the input (..., in).
            down: the down factor (r, in).
            up: the up factor (out, r), with every scale in it.
        """
        u = self.op(self.drop(x, p), down)
        return F.linear(u, up.to(u.dtype))

    def built(
        self, x: Tensor, build: Callable[[Tensor], Tensor], onto: Tensor | None = None
    ) -> Tensor:
        """The output (..., out) with another matrix than W, which is built for this product and
        again in the backward, so that a step never holds more than one.

        Args:
            x: the input (..., in).
            build: makes the matrix (out, in) from W, with random numbers of no kind.
            onto: a tensor (..., out) that is added before a bias, or None.
        """

        def run(x: Tensor, onto: Tensor | None) -> Tensor:
            w, b = self.dense()
            m = build(w)
            if x.is_floating_point():  # in autocast's dtype, with which W was not stored
                m = rounded(m, x.dtype)
            y = add(self.op(x, m), onto)
            return y if b is None else y + self.each(b).to(y.dtype)

        return recomputed(run, x, onto)

    def sparse(self, x: Tensor, values: Tensor, at: Tensor, onto: Tensor | None = None) -> Tensor:
        """The output (..., out) with values added at some entries of W.

        Args:
            x: the input (..., in).
            values: what is added (k,).
            at: the ascending positions (k,) in the flattened W.
            onto: a tensor (..., out) that is added before a bias, or None.
        """
        return self.built(x, lambda w: scatter_added(w, values, at), onto)


def bare(module: nn.Module) -> nn.Module:
    """The module as it is without deltas: an object of its own class with the same state, whose
    `weight` and `bias` are the stored ones (`lorafold.core.served_weights`).
    """
    cls = getattr(type(module), "base_class", None)
    if cls is None or not ("weight" in module._parameters or "bias" in module._parameters):
        return module
    twin = object.__new__(cls)
    if torch.compiler.is_compiling():  # torch before 2.13 can't trace that one dict is set
        for name, value in module.__dict__.items():
            object.__setattr__(twin, name, value)
        return twin
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


class BaseLayer(Layer):
    """Abstract: the module itself, frozen. `lorafold.layers` has one final subclass per storage."""

    quantized = False  # whether it stores codes, which are dequantized for each use
    linear = False  # whether it is a matrix applied to activations, as "all-linear" means it
    mixes_rows = False  # whether rows of its input decide how the module itself computes others

    def __init__(self, module: nn.Module, stored: Callable[[], Tensor] | None = None) -> None:
        self.module, self.stored = module, stored  # `stored`: reads the weight from plain files
        self.bare: Any = bare(module)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.bare, "bias", None)

    @property
    def has_bias(self) -> bool:
        return self.parameter("bias") is not None

    def sources(self) -> list[Tensor] | None:
        own = chain(self.module._parameters.values(), self.module._buffers.values())
        return [tensor for tensor in own if tensor is not None]

    def parameter(self, name: str) -> Any:
        """The stored parameter, of any shape, whose name is "weight" or "bias"; None if there is
        none.
        """
        return self.module._parameters.get(name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, without any delta."""
        cls = type(self.module)
        return getattr(cls, "base_class", cls).forward(self.bare, *args, **kwargs)

    @staticmethod
    def called(layer: Layer, /, *args: Any, **kwargs: Any) -> Any:
        """Run a layer over this one where the model calls the module.

        Args:
            *args: the inputs of the module's forward.
            **kwargs: its inputs by name.
        """
        return layer(*args, **kwargs)

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """The parameters that would store W (out, in) and b (out,) in the module, by name, in the
        dtypes given. The module is not changed. Raises NotMergeable if it can't store them.
        """
        return {"weight": w} if b is None else {"weight": w, "bias": b}

    @classmethod
    def entered(cls, module: nn.Module) -> None:
        """Do what a module needs when it gets its first delta."""
        return None

    @classmethod
    def left(cls, module: nn.Module) -> None:
        """Undo `entered`, when the last delta is detached."""
        return None

    def dense_like(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in) and b (out,) or None as `dense` gives them, on the meta device."""
        w, b = self.dense()
        return w.to("meta"), None if b is None else b.to("meta")

    def plain(self) -> BaseLayer:
        """The layer that this becomes by `dequantize`."""
        return self

    def write(self, w: Tensor, b: Tensor | None) -> None:
        """Store W (out, in) and b (out,) in the module, rounded once to its dtype: in place where a
        parameter has the same shape, else as a new parameter.

        Raises NotMergeable if the module can't store them.
        """
        for name, value in self.encode(w, b).items():
            old = getattr(self.bare, name, None)
            if old is not None and old.shape == value.shape:
                with torch.no_grad():
                    old.copy_(value)
                continue
            like = self.bare.weight if old is None else old
            new = nn.Parameter(value.detach().to(like.dtype, copy=True), like.requires_grad)
            setattr(self.module, name, new)

    def dequantize(self) -> None:
        """Make a quantized module store its matrix in floating point, so that `write` works."""
        return None
