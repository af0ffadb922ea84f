"""A folded matrix in its module's layout: transposed or not, and longer where the vocabulary grew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafold.bases import layer_of


@torch.no_grad()
def as_stored(module: nn.Module, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """The parameters by which the module would store a matrix, by name, in fp32 or wider. They are
    new tensors, without values on the meta device; the module is not changed.

    Args:
        module: A module of any storage.
        w: W, (out, in).
        b: The bias, (out,), or None.
    """
    layer = layer_of(module)
    found = {}
    for name, value in layer.plain().encode(w, b).items():
        own = value if layer.quantized else layer.parameter(name)
        dtype = (layer.parameter("weight") if own is None else own).dtype
        found[name] = torch.empty(
            value.shape, dtype=torch.promote_types(dtype, torch.float32), device=value.device
        ).copy_(value)
    return found


def settled(target: Tensor, original: Tensor, values: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(target, original), both (n', k), equal in the vectors that adapters replace or append: there
    both have the target's values, rounded to nearest.

    Such a vector is not an update of a weight, which rounding could lose. Equal in both tensors, it
    counts neither as update nor as noise in the figures for the others.

    Args:
        target: The folded weight, (n', k) with n' >= n.
        original: The weight before, (n, k).
        values: Indices of the vectors that adapters replace.
    """
    at = torch.tensor(
        [*(i for i in values if i < len(original)), *range(len(original), len(target))],
        dtype=torch.long,
    )
    if not len(at):
        return target, original
    nearest = target[at].to(original.dtype)
    original = torch.cat(
        [original, original.new_empty(len(target) - len(original), *original.shape[1:])]
    )
    return target.index_copy_(0, at, nearest.to(target.dtype)), original.index_copy_(0, at, nearest)
