"""A folded matrix as its module stores it: transposed or not, and with more rows where the
vocabulary grew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorafold.bases import layer_of

SIZES = ("num_embeddings", "out_features")  # what a module says of its rows


@torch.no_grad()
def as_stored(module: nn.Module, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """The parameters that the module would have for W (out, in) and b (out,), in fp32 or wider; the
    module is left as it is.

    On the meta device these are shapes alone.
    """
    own = {n: p for n, p in module._parameters.items() if p is not None}
    wide = {
        n: torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32), device=w.device)
        for n, p in own.items()
    }
    with _holding(module, wide):
        layer_of(module).write(w, b)
        return {n: p.detach() for n, p in module._parameters.items() if p is not None}


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


@contextmanager
def _holding(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let these tensors stand in the places of the module's parameters."""
    before, sizes = (
        dict(module._parameters),
        {name: getattr(module, name) for name in SIZES if hasattr(module, name)},
    )
    module._parameters.update({n: nn.Parameter(t, requires_grad=False) for n, t in tensors.items()})
    try:
        yield
    finally:
        module._parameters.clear()
        module._parameters.update(before)
        for name, size in sizes.items():
            setattr(module, name, size)
