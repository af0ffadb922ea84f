"""The fast path: faster replacements of modules, which are recognized by their computation.

Norms, rotary embeddings and gated MLPs are fused as in training
(`lorafold.training_step.fused_modules`). On CPUs, 16-bit matrices are copied into oneDNN's blocked
layout, as fp32 or, if they are bf16 and the processor has bf16 matmuls, as bf16. Matrices with the
same input are concatenated. The kernel adds the adapters' updates, so there is one matmul and one
rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import deltas_on
from lorafold.engine.mixed_adapters import ActiveDeltas
from lorafold.engine.model_structure import Structure
from lorafold.engine.operations import Operations, min_invariant_rows, random_rows
from lorafold.layers import is_linear, layer_of
from lorafold.ops.arithmetic import FEW, HALF, multiplies_bf16
from lorafold.training_step.fused_modules import fused

log = logging.getLogger(__name__)


def fast_path(
    model: Any,
    structure: Structure,
    deltas: ActiveDeltas,
    operations: Operations,
    rows: int,
    stack: ExitStack,
) -> None:
    """Replaces modules of a frozen model until the stack is closed. `rows` is the expected number
    of rows per forward pass.
    """
    norm, rotary, gated = operations.rms_norm, operations.rotary, operations.gated
    stack.enter_context(fused(model, False, norm, rotary, gated))
    min_rows_by_shape: dict[Any, int] = {}
    for group in structure.groups:
        packable = {
            path: module
            for path in group
            if is_packable(module := model.get_submodule(path))
            and not deltas_on(module, deltas.base)
        }
        if not packable:
            continue
        packed = PackedMatrices(packable, deltas, rows, min_rows_by_shape)
        for path, module in packable.items():
            module.forward = partial(packed, path)
            deltas.aware.add(path)
            stack.callback(vars(module).pop, "forward", None)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of matmuls with 16-bit matrices."""
    return dtype if dtype == torch.bfloat16 and multiplies_bf16() else torch.float32


def is_packable(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dtype in HALF
        and weight.device.type == "cpu"
        and weight.numel() == prod(layer_of(module).shape)
        and torch.backends.mkldnn.is_available()
        and "forward" not in vars(module)
    )


def packed_bytes(model: nn.Module) -> int:
    """Returns the maximum bytes of the copies of a model's matrices in the kernel's layout."""
    modules = [module for _, module in Anatomy.of(model).modules]
    weights = [m.get_parameter("weight") for m in modules if is_linear(m) and is_packable(m)]
    return sum(w.numel() * product_dtype(w.dtype).itemsize for w in weights)


class PackedMatrices:
    """Matrices with the same input, concatenated in the kernel's layout. For each input, the first
    call computes the outputs of all matrices.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        deltas: ActiveDeltas,
        rows: int,
        min_rows_by_shape: dict[Any, int],
    ) -> None:
        self.modules, self.paths, self.deltas = dict(modules), tuple(modules), deltas
        self.layers = [layer_of(module) for module in modules.values()]
        self.widths = [layer.shape[0] for layer in self.layers]
        dense = [layer.dense() for layer in self.layers]
        with torch.no_grad():
            whole = torch.cat([w.detach() for w, _ in dense])
            self.dtype, w = whole.dtype, whole.to(product_dtype(whole.dtype))
            self._w = torch.ops.mkldnn._reorder_linear_weight(w, rows)
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in dense]
            biased = any(b is not None for _, b in dense)
            self._bias = torch.cat(biases).to(w.dtype) if biased else None
        kernel = torch.ops.mkldnn._linear_pointwise
        self._plain, self._kernel_onto = kernel.default, kernel.binary
        shape = (tuple(w.shape), w.dtype)
        if shape not in min_rows_by_shape:
            x = random_rows(w.shape[1], w.dtype)
            # adding the negative product leaves rounding errors, which 16-bit rounding would hide
            min_rows_by_shape[shape] = min_invariant_rows(self._kernel, x, -self._kernel(x))
            if min_rows_by_shape[shape] > FEW:
                log.debug(
                    "on this CPU, matmuls with %s matrices of shape %s depend on the number of"
                    " rows, so they are computed %d rows at a time", *shape[::-1], FEW,
                )  # fmt: skip
        self._min_rows = min_rows_by_shape[shape]
        self._x: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}  # outputs for x that are not returned yet

    def __call__(self, path: str, x: Tensor) -> Tensor:
        deltas, module = self.deltas, self.modules[path]
        adapted = not deltas.mixing and deltas_on(module, deltas.selection.names)
        if adapted or x.dtype != self.dtype:
            return type(module).forward(module, x)
        y = self._output(path, x)
        layer, adapters = layer_of(module), deltas.slot_adapters
        return adapters.apply_deltas(path, layer, x, y) if deltas.mixing else y

    def _output(self, path: str, x: Tensor) -> Tensor:
        if len(self.paths) == 1:
            return self.product(x, self._onto(x))
        if self._x is not x or path not in self._outputs:
            parts = torch.split_with_sizes(self.product(x, self._onto(x)), self.widths, -1)
            self._x, self._outputs = x, dict(zip(self.paths, parts, strict=True))
        y = self._outputs.pop(path)
        if not self._outputs:
            self._x = None
        return y

    def product(self, x: Tensor, onto: Tensor | None) -> Tensor:
        """Returns W x + b + onto (..., out + ...) with a single rounding."""
        rows = x.numel() // x.shape[-1]
        inputs = [t.reshape(rows, -1).to(self._w.dtype) for t in (x, onto) if t is not None]
        if self._min_rows > FEW:
            blocks = zip(
                *(_padded(t, -(-rows // FEW) * FEW).split(FEW) for t in inputs), strict=True
            )
            y = torch.cat([self._kernel(*block) for block in blocks])[:rows]
        else:
            y = self._kernel(*(_padded(t, self._min_rows) for t in inputs))[:rows]
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _kernel(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if onto is None:
            return self._plain(x, self._w, self._bias, "none", [], "")
        return self._kernel_onto(x, onto, self._w, self._bias, "add")

    def _onto(self, x: Tensor) -> Tensor | None:
        slot_adapters = self.deltas.slot_adapters
        if not self.deltas.mixing or slot_adapters.plan.low_rank.isdisjoint(self.paths):
            return None
        return slot_adapters.product(self.paths, x, self.layers)


def _padded(x: Tensor, rows: int) -> Tensor:
    """Repeats the first row of x (n, ...) up to `rows` rows."""
    if len(x) >= rows:
        return x
    return torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])])
