"""What a delta sees: a layer that can be run on an input and, where it is linear, read as a matrix.

    layer(x)            what lies beneath, with its own kernel                      (..., in) ->
                        (..., out)
    layer(x, onto=d)    the same, accumulated onto d before the one rounding; a bias is added after
                        it
    layer.op(x, m)      this layer's input times any m (k, in)                      -> (..., k)
    layer.dense()       W (out, in), b (out,) | None

A layer under a delta is a layer (`Over`) and a layer whose answer is known is a layer (`Given`), so
stacks and combinators need no case of their own. How a module stores its matrix is the business of
`Base`'s subclasses in `lorafold.bases`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorafold.core.delta import Delta


def add(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def bare(module: nn.Module) -> nn.Module:
    """The module as nothing lies over it: another object of its own class with the very same state,
    whose `weight` and `bias` are those that are stored (`lorafold.core.served_weights`).
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
    """Anything a delta can lie on. `shape` is (out, in); `NotMergeable` where there is no
    matrix.
    """

    __call__: Callable[..., Any]  # (x, onto=None) for a matrix, whatever it takes for anything else

    @abstractmethod
    def op(self, x: Tensor, m: Tensor) -> Tensor: ...

    @abstractmethod
    def drop(self, x: Tensor, p: float) -> Tensor: ...

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor | None]: ...

    @property
    def bias(self) -> Tensor | None:  # (out,)
        return self.dense()[1]

    def original(self) -> Tensor:  # (out, in)
        """W as it was before it was packed; `dense` where it never was.

        LorafoldError where that is not known.
        """
        return self.dense()[0]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def module(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device:
        """Where the module's parameters lie, and what is laid on it belongs."""
        return next(self.module.parameters()).device

    @property
    @abstractmethod
    def takes_ids(self) -> bool:
        """Are its inputs row numbers, and not activations?"""

    @property
    @abstractmethod
    def has_bias(self) -> bool:
        """Does the module have a bias of its own?"""

    @abstractmethod
    def sources(self) -> list[Tensor] | None:
        """The tensors that `dense` is read from; None where a delta beneath bears on it too."""

    def low_rank(
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None
    ) -> Tensor:
        """self(x) + up down drop(x), the small product first: down (r, in), up (out, r), p the
        dropout on the branch.
        """
        u = self.op(self.drop(x, p), down)
        return self(x, onto=add(F.linear(u, up.to(u.dtype)), onto))


class Base(Layer):
    """Abstract: the frozen module itself. One final subclass a storage, in `lorafold.bases`."""

    linear = False  # a matrix applied to activations: what "all-linear" means
    takes_ids = False

    def __init__(self, module: nn.Module, stored: Callable[[], Tensor] | None = None) -> None:
        self._module, self.stored = module, stored  # `stored`: the weight as plain files hold it
        self.bare: Any = bare(module)

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def has_bias(self) -> bool:
        return self._module._parameters.get("bias") is not None

    def sources(self) -> list[Tensor] | None:
        return [p for p in self._module._parameters.values() if p is not None]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, as if nothing lay over it."""
        cls = type(self._module)
        return getattr(cls, "base_class", cls).forward(self.bare, *args, **kwargs)

    @abstractmethod
    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """The parameters by which the module would store W (out, in) and b (out,), in the dtypes
        given; the module is left as it is. NotMergeable if it can't hold them.
        """

    def dense_like(self) -> tuple[Tensor, Tensor | None]:
        """`dense` on the meta device: shapes and dtypes alone."""
        w, b = self.dense()
        return w.to("meta"), None if b is None else b.to("meta")

    def plain(self) -> Base:
        """The layer that this is once `unpack` has been called."""
        return self

    @abstractmethod
    def write(self, w: Tensor, b: Tensor | None) -> None:
        """Store W (out, in) and b (out,) in the module, rounded once to its dtype.

        NotMergeable if the module can't hold them.
        """

    def unpack(self) -> None:
        """Let the module hold its matrix in plain floating-point numbers, which it can be written
        in.
        """
        return None


class Upon(Layer):
    """Abstract: a layer upon another, whose input, shape and module it has."""

    under: Layer

    def original(self) -> Tensor:
        return self.under.original()

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
    """A layer with one delta laid over it."""

    def __init__(self, delta: Delta, under: Layer) -> None:
        self.delta, self.under = delta, under

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta(self.under, *args, **kwargs)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.delta.fold(*self.under.dense())

    def sources(self) -> list[Tensor] | None:
        return None


class Given(Upon):
    """A layer whose answer is already known, so that a combinator runs what lies beneath once."""

    def __init__(self, under: Layer, y: Tensor) -> None:
        self.under, self.y = under, y

    def __call__(self, *args: Any, onto: Tensor | None = None, **kwargs: Any) -> Tensor:
        return add(self.y, onto)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.under.dense()

    def sources(self) -> list[Tensor] | None:
        return self.under.sources()
