"""The fast path: the model's own classes with faster parts, recognized by what they compute.

    with fast(model, structure, laid, rows=16): ...

Norms, rotary embeddings and gated MLPs are those of training (`lorafold.step.fused`). A matrix in
bf16 on a CPU is kept once more in the order that oneDNN's kernel wants, and what adapters add is
the start of the kernel's sum: one product and one rounding. With 16 rows on two cores of an AMD
EPYC, the product with a matrix of 1536 x 576 takes 70 us so, and 300 us by `F.linear`. Whatever
does not fit keeps its own code, so the plain path stays the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.bases import layer_of
from lorafold.core.attach import deltas_on
from lorafold.core.layer import Layer
from lorafold.engine.laid import Laid
from lorafold.engine.structure import Structure
from lorafold.ops.arithmetic import arithmetic
from lorafold.step.fused import fused

Product = Callable[[Tensor, Tensor | None], Tensor]  # x (..., in), onto (..., out) -> (..., out)


@contextmanager
def fast(model: Any, structure: Structure, laid: Laid, rows: int) -> Iterator[None]:
    """Replace what can be replaced until the `with` block ends.

    Args:
        model: the model, frozen, in evaluation mode.
        structure: what is known of it.
        laid: the engine's deltas on it.
        rows: how many rows a pass usually has.
    """
    with ExitStack() as stack:
        stack.enter_context(fused(model, linears=False))
        for path in structure.where:
            module = model.get_submodule(path)
            if "forward" in vars(module) or deltas_on(module, laid.base):
                continue
            if (product := packed(module, rows)) is not None:
                module.forward = partial(_forward, module, layer_of(module), path, product, laid)
                laid.aware.add(path)
                stack.callback(vars(module).pop, "forward", None)
        yield


def packed(module: nn.Module, rows: int) -> Product | None:
    """W x + b + onto of a module, with W (out, in) in the kernel's order; None if it is not stored
    in bf16 on a CPU.
    """
    weight, layer = module._parameters.get("weight"), layer_of(module)
    if weight is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None
    if weight.numel() != prod(layer.shape) or not torch.backends.mkldnn.is_available():
        return None
    w, bias = layer.dense()
    with torch.no_grad():
        ordered = torch.ops.mkldnn._reorder_linear_weight(w.detach().contiguous(), rows)
    plain, added = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._linear_pointwise.binary

    def product(x: Tensor, onto: Tensor | None) -> Tensor:
        if x.dtype != torch.bfloat16 or arithmetic(x) is not x.dtype:
            y: Tensor = layer(x, onto=onto)
        elif onto is None:
            y = plain(x, ordered, bias, "none", [], "")
        else:
            y = added(x, onto, ordered, bias, "add")
        return y

    return product


def _forward(
    module: nn.Module, layer: Layer, path: str, product: Product, laid: Laid, x: Tensor
) -> Tensor:
    plan = laid.products.plan
    if path in plan.others if laid.mixing else deltas_on(module, laid.selection.names):
        y: Tensor = type(module).forward(module, x)
        return y
    adds = laid.mixing and path in plan.products
    return product(x, laid.products.product(path, x, layer) if adds else None)
