"""A layer is a delta's view of a module: it can be run and, if it is linear, read as a matrix.

A layer of experts has several matrices of one shape, W (E, out, in), and multiplies each row of its
input by one of them. A layer with a delta is again a layer (`delta.Over`). The bottom layer is the
frozen module (`BaseLayer`); only its subclasses in `lorafold.layers` depend on the weight format.
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

WeightAndBias = tuple[Tensor, Tensor | None]  # W (*matrices, out, in), b (*matrices, out)


def add(a: Tensor, b: Tensor | None) -> Tensor:
    """Returns a + b, of any shapes that broadcast, or a if b is None."""
    return a if b is None else a + b


class Layer(ABC):
    """Abstract: anything that a delta can be attached to.

    Calling a linear layer with x (..., in) gives (..., out). `onto` (..., out) is added before the
    sum is rounded once, and a bias after that.
    """

    __call__: Callable[..., Any]  # (x, onto=None) if linear, else the module's own signature
    module: nn.Module  # the module at the bottom
    matrices: tuple[int, ...] = ()  # the number of matrices, (E,), or () for one
    # the number of columns of W per input channel: the kernel positions of a convolution
    window: int = 1
    takes_ids: bool = False  # whether its inputs are ids (an embedding)

    @abstractmethod
    def op(self, x: Tensor, m: Tensor) -> Tensor:
        """Returns the product of this layer's input x (..., in) and m (k, in), without a bias:
        (..., k).

        For an embedding, x holds ids (...), and the product is a lookup. Raises NotMergeable if the
        layer is not linear.
        """

    def op_once(self, x: Tensor, m: Tensor) -> Tensor:
        """Returns `op` of x (..., in) and the first `in` columns of a frozen m (k, in or more):
        (..., k).

        Layers that read the same x with the same m may share the result.
        """
        return self.op(x, m[..., : self.shape[1]])

    @abstractmethod
    def drop(self, x: Tensor, p: float) -> Tensor:
        """Returns x (..., in) after dropout with probability p; ids (...) are returned unchanged.
        """

    @abstractmethod
    def dense(self) -> WeightAndBias:
        """Returns W (out, in) in the compute dtype and b (out,) or None, with the deltas below
        folded in.

        Raises NotMergeable if there is no weight, or if a delta below can't be folded.
        """

    @abstractmethod
    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """Returns g * y + c + onto (..., k), summed in fp32 and rounded once.

        Args:
            y: an input or an output (..., k) of the layer.
            g: the gains (*matrices, k).
            c: offsets (*matrices, k), or None.
            onto: a tensor that broadcasts to y, or None.
        """

    def each(self, v: Tensor) -> Tensor:
        """Returns vectors v (*matrices, k), one for each matrix, in a form that broadcasts to
        outputs (..., k).
        """
        return v

    @property
    def bias(self) -> Tensor | None:  # (*matrices, out)
        """The bias (*matrices, out) of `dense`, or None."""
        return self.dense()[1]

    def reading_once(self) -> AbstractContextManager[object]:
        """Context manager: a quantized W is dequantized only once."""
        return nullcontext()

    def weight_times(self, m: Tensor) -> Tensor:  # (*matrices, out, k)
        """Returns W m^T (*matrices, out, k) for a factor m (*matrices, k, in), in m's dtype."""
        w = self.dense()[0]
        return (w @ m.to(w.dtype).mT).to(m.dtype)

    def original(self) -> Tensor:  # (out, in)
        """Returns W (out, in) before quantization, with the deltas below folded in; it equals
        `dense` if W was never quantized.

        Raises LorafoldError if the original is not available.
        """
        return self.dense()[0]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of W. Raises NotMergeable if the layer is not linear."""

    @property
    def device(self) -> torch.device:
        """The device of the module's parameters (or buffers), on which its deltas are created.

        Raises LorafoldError if the module has no tensor.
        """
        if (first := next(chain(self.module.parameters(), self.module.buffers()), None)) is None:
            raise LorafoldError(
                f"{type(self.module).__name__}: found no parameter and no buffer, expected a module"
                " with a tensor"
            )
        return first.device

    @property
    def takes_vectors(self) -> bool:
        """Whether the inputs are vectors (..., in), whose components a method may change."""
        return not self.takes_ids

    @property
    @abstractmethod
    def has_bias(self) -> bool:
        """Whether the module has a bias."""

    @abstractmethod
    def sources(self) -> list[Tensor] | None:
        """Returns the tensors, of any shape, that determine `dense`, or None if it depends on a
        delta.
        """

    def low_rank(
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None, k: float = 1.0
    ) -> Tensor:
        """Returns self(x) + k up (down drop(x)), without computing up @ down: (..., in) -> (...,
        out).

        Args:
            x: the input (..., in).
            down: the down factor (r, in).
            up: the up factor (out, r).
            p: the probability of dropout on the branch.
            onto: a tensor (..., out) that is added before the rounding, or None.
            k: a factor that is multiplied into `up` before any rounding.
        """
        return self(x, onto=add(self.branch(x, down, up if k == 1.0 else k * up, p), onto))

    def branch(self, x: Tensor, down: Tensor, up: Tensor, p: float) -> Tensor:
        """Returns up (down drop(x)), without computing up @ down: (..., in) -> (..., out).

        Args:
            x: the input (..., in).
            down: the down factor (r, in).
            up: the up factor (out, r), including every scale.
        """
        u = self.op(self.drop(x, p), down)
        return F.linear(u, up.to(u.dtype))

    def built(
        self, x: Tensor, build: Callable[[Tensor], Tensor], onto: Tensor | None = None
    ) -> Tensor:
        """Returns the layer's output (..., out) with a matrix built from W in place of W. The
        backward pass builds this matrix again, so that a step holds only one such matrix at a time.

        Args:
            x: the input (..., in).
            build: makes the matrix (out, in) from W, without random numbers.
            onto: a tensor (..., out) that is added before a bias, or None.
        """

        def run(x: Tensor, onto: Tensor | None) -> Tensor:
            w, b = self.dense()
            m = build(w)
            if x.is_floating_point():  # autocast's dtype may differ from W's
                m = rounded(m, x.dtype)
            y = add(self.op(x, m), onto)
            return y if b is None else y + self.each(b).to(y.dtype)

        return recomputed(run, x, onto)

    def sparse(self, x: Tensor, values: Tensor, at: Tensor, onto: Tensor | None = None) -> Tensor:
        """Returns the layer's output (..., out) with values added to some entries of W.

        Args:
            x: the input (..., in).
            values: the added values (k,).
            at: the ascending positions (k,) in the flattened W.
            onto: a tensor (..., out) that is added before a bias, or None.
        """
        return self.built(x, lambda w: scatter_added(w, values, at), onto)


def bare(module: nn.Module) -> nn.Module:
    """Returns the module without its deltas: an object of its original class that shares its state.
    """
    cls = getattr(type(module), "base_class", None)
    if cls is None or not ("weight" in module._parameters or "bias" in module._parameters):
        return module
    twin = object.__new__(cls)
    if torch.compiler.is_compiling():  # torch before 2.13 can't trace setting `__dict__`
        for name, value in module.__dict__.items():
            object.__setattr__(twin, name, value)
        return twin
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


class BaseLayer(Layer):
    """Abstract: the frozen module itself. `lorafold.layers` has one final subclass per kind of
    module and weight format.
    """

    quantized = False  # whether it stores codes, which are dequantized for each use
    linear = False  # whether it is a matrix applied to activations, in the sense of "all-linear"
    mixes_rows = False  # whether input rows can affect the module's output for other rows

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
        """Returns the stored "weight" or "bias", of any shape, or None."""
        return self.module._parameters.get(name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's original forward, without deltas."""
        cls = type(self.module)
        return getattr(cls, "base_class", cls).forward(self.bare, *args, **kwargs)

    @staticmethod
    def called(layer: Layer, /, *args: Any, **kwargs: Any) -> Any:
        """Runs a layer on top of this one with the arguments of the module's call.

        Args:
            *args: the inputs of the module's forward.
            **kwargs: the keyword inputs of the module's forward.
        """
        return layer(*args, **kwargs)

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """Returns the parameters, by name, that would store W (out, in) and b (out,) in the module,
        in the given dtypes; the module does not change. Raises NotMergeable if the module can't
        store them.
        """
        return {"weight": w} if b is None else {"weight": w, "bias": b}

    @classmethod
    def entered(cls, module: nn.Module) -> None:
        """Prepares a module for its first delta."""
        return None

    @classmethod
    def left(cls, module: nn.Module) -> None:
        """Undoes `entered` after the last delta is detached."""
        return None

    def dense_like(self) -> WeightAndBias:
        """Returns W (out, in) and b (out,) or None like `dense`, on the meta device."""
        w, b = self.dense()
        return w.to("meta"), None if b is None else b.to("meta")

    def plain(self) -> BaseLayer:
        """Returns the layer that this one becomes after `dequantize`."""
        return self

    def write(self, w: Tensor, b: Tensor | None) -> None:
        """Stores W (out, in) and b (out,) in the module, rounded once to its dtype, in place if
        possible.

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
        """Converts a quantized module's matrix to floating point, so that `write` works."""
        return None
