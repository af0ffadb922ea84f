"""The fast path: the model's own classes with faster parts, recognized by what they compute.

    with fast(model, structure, laid, operations, rows=16): ...

Norms, rotary embeddings and gated MLPs are those of training (`lorafold.step.fused`). Matrices in
bf16 on a CPU are kept once more in the order that oneDNN's kernel wants, those that read the same
tensor as one, and what adapters add is the start of the kernel's sum: one product and one rounding.
With 16 rows on two cores of an AMD EPYC, the product with a matrix of 1536 x 576 takes 70 us so,
and 300 us by `F.linear`. Whatever does not fit keeps its own code, so the plain path stays the
specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.bases import layer_of
from lorafold.core.attach import deltas_on
from lorafold.engine.laid import Laid
from lorafold.engine.operations import Operations
from lorafold.engine.structure import Structure
from lorafold.ops.arithmetic import arithmetic
from lorafold.step.fused import fused

ROWS = (1, 2, 3, 4, 6, 8, 16)  # numbers of rows that may be summed in orders of their own


@contextmanager
def fast(
    model: Any, structure: Structure, laid: Laid, operations: Operations, rows: int
) -> Iterator[None]:
    """Replace what can be replaced until the `with` block ends.

    Args:
        model: the model, frozen, in evaluation mode.
        structure: what is known of it.
        laid: the engine's deltas on it.
        operations: those of its norms and rotary embeddings.
        rows: how many rows a pass usually has.
    """
    with ExitStack() as stack:
        stack.enter_context(
            fused(model, False, operations.rms_norm, operations.rotary, operations.gated)
        )
        for group in structure.groups:
            found = {path: model.get_submodule(path) for path in group}
            fits = {
                path: module
                for path, module in found.items()
                if packable(module) and not deltas_on(module, laid.base)
            }
            if not fits:
                continue
            packed = Packed(fits, laid, rows)
            for path, module in fits.items():
                module.forward = partial(packed, path)
                laid.aware.add(path)
                stack.callback(vars(module).pop, "forward", None)
        yield


def multiplies_bf16() -> bool:
    """Whether oneDNN has products in bf16 for this processor."""
    available = torch.backends.mkldnn.is_available()
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packable(module: nn.Module) -> bool:
    """Whether a module is a matrix in bf16 on a CPU that runs its class's own code."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.numel() == prod(layer_of(module).shape)
        and multiplies_bf16()
        and "forward" not in vars(module)
    )


class Packed:
    """Matrices that read the same tensor, as one in the kernel's order. The first that is called
    computes the outputs of all.

    Args:
        modules: the modules by path.
        laid: the engine's deltas on the model.
        rows: how many rows a pass usually has.
    """

    def __init__(self, modules: Mapping[str, nn.Module], laid: Laid, rows: int) -> None:
        self.modules, self.paths, self.laid = dict(modules), tuple(modules), laid
        self.layers = [layer_of(module) for module in modules.values()]
        self.widths = [layer.shape[0] for layer in self.layers]
        dense = [layer.dense() for layer in self.layers]
        with torch.no_grad():
            w = torch.cat([w.detach() for w, _ in dense])
            self._w = torch.ops.mkldnn._reorder_linear_weight(w, rows)
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in dense]
            self._bias = torch.cat(biases) if any(b is not None for _, b in dense) else None
        kernel = torch.ops.mkldnn._linear_pointwise
        self._plain, self._added = kernel.default, kernel.binary
        self._least = self._steady(self.layers[0].shape[1])
        self._x: Tensor | None = None
        self._left: dict[str, Tensor] = {}  # outputs for x that were not asked for yet

    def __call__(self, path: str, x: Tensor) -> Tensor:
        """The output of the module at a path."""
        laid, module = self.laid, self.modules[path]
        own = not laid.mixing and deltas_on(module, laid.selection.names)
        if own or x.dtype != torch.bfloat16 or arithmetic(x) is not x.dtype:
            y: Tensor = type(module).forward(module, x)
            return y
        y = self._output(path, x)
        return laid.products.changed(path, layer_of(module), x, y) if laid.mixing else y

    def _output(self, path: str, x: Tensor) -> Tensor:
        if len(self.paths) == 1:
            return self.product(x, self._onto(x))
        if self._x is not x or path not in self._left:
            parts = torch.split_with_sizes(self.product(x, self._onto(x)), self.widths, -1)
            self._x, self._left = x, dict(zip(self.paths, parts, strict=True))
        y = self._left.pop(path)
        if not self._left:
            self._x = None
        return y

    def product(self, x: Tensor, onto: Tensor | None) -> Tensor:
        """W x + b + onto (..., out + ...), rounded once.

        Args:
            x: (..., in), in bf16.
            onto: what is added, in bf16, or None.
        """
        if (rows := x.numel() // x.shape[-1]) < self._least:
            more = [x, onto] if onto is not None else [x]
            padded = [_padded(t.reshape(rows, -1), self._least) for t in more]
            return self._kernel(*padded)[:rows].view(*x.shape[:-1], -1)
        return self._kernel(x, onto)

    def _kernel(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if onto is None:
            y: Tensor = self._plain(x, self._w, self._bias, "none", [], "")
        else:
            y = self._added(x, onto, self._w, self._bias, "add")
        return y

    def _steady(self, width: int) -> int:
        """The number of rows from which on the kernel sums in one order, whatever their number; it
        has another one for a single row where the sums are long.
        """
        x = torch.randn(ROWS[-1], width, generator=torch.Generator().manual_seed(0)).bfloat16()
        rest = -self._kernel(x)
        whole = self._kernel(x, rest)  # the rounding errors, which differ where the order does
        least = ROWS[-1]
        for n in reversed(ROWS[:-1]):
            if not torch.equal(self._kernel(x[:n], rest[:n]), whole[:n]):
                break
            least = n
        return least

    def _onto(self, x: Tensor) -> Tensor | None:
        products = self.laid.products
        if not self.laid.mixing or products.plan.products.isdisjoint(self.paths):
            return None
        return products.product(self.paths, x, self.layers)


def _padded(x: Tensor, rows: int) -> Tensor:
    """x (n, ...) with its first row repeated until there are that many."""
    return torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])])
