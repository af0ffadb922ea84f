"""The layer at the bottom: a module itself, frozen.

How a module stores its matrix is known only to the subclasses of `Base` in `lorafold.bases`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.layer import Layer


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


class Base(Layer):
    """Abstract: the module itself, frozen. `lorafold.bases` has one final subclass per storage."""

    quantized = False  # whether it stores codes, which are dequantized for each use
    linear = False  # whether it is a matrix applied to activations, as "all-linear" means it
    takes_ids = False
    mixes_rows = False  # whether rows of its input decide how the module itself computes others

    def __init__(self, module: nn.Module, stored: Callable[[], Tensor] | None = None) -> None:
        self._module, self.stored = module, stored  # `stored`: reads the weight from plain files
        self.bare: Any = bare(module)

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def has_bias(self) -> bool:
        return self.parameter("bias") is not None

    def sources(self) -> list[Tensor] | None:
        own = chain(self._module._parameters.values(), self._module._buffers.values())
        return [tensor for tensor in own if tensor is not None]

    def parameter(self, name: str) -> Any:
        """The stored parameter, of any shape, whose name is "weight" or "bias"; None if there is
        none.
        """
        return self._module._parameters.get(name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, without any delta."""
        cls = type(self._module)
        return getattr(cls, "base_class", cls).forward(self.bare, *args, **kwargs)

    @staticmethod
    def called(layer: Layer, /, *args: Any, **kwargs: Any) -> Any:
        """Run a layer over this one where the model calls the module.

        Args:
            *args: the inputs of the module's forward.
            **kwargs: its inputs by name.
        """
        return layer(*args, **kwargs)

    @abstractmethod
    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """The parameters that would store W (out, in) and b (out,) in the module, by name, in the
        dtypes given. The module is not changed. Raises NotMergeable if it can't store them.
        """

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
