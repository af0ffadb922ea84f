"""A folded matrix as its module stores it: transposed or not, and with more rows where the
vocabulary grew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafold.bases import layer_of


@torch.no_grad()
def as_stored(module: nn.Module, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """The parameters that the module would have for W (out, in) and b (out,), in fp32 or wider, in
    memory of their own; the module is left as it is.

    On the meta device these are shapes alone.
    """
    layer = layer_of(module)
    found = {}
    for name, value in layer.encode(w, b).items():
        own = module._parameters.get(name)
        dtype = (layer.bare.weight if own is None else own).dtype
        found[name] = torch.empty(
            value.shape, dtype=torch.promote_types(dtype, torch.float32), device=value.device
        ).copy_(value)
    return found


def settled(target: Tensor, original: Tensor, values: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both with one length, and alike in the rows at `values` and in those that `original` lacks:
    the target's, rounded to the nearest.

    A row that is put there outright, or appended, is a value and no update of a weight: there is
    nothing of it that rounding could lose, and it must not hide what rounding does to the others.
    So it counts neither as an update nor as noise.
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
