"""Rows of the table: methods that PEFT lacks, in its layout under a peft_type of our own.

    BOTTLENECK               {at}.bottleneck_down.weight (m, d), .bias (m,), {at}.bottleneck_up.weight (d, m), .bias (d,)
    LT_SFT, FISH_MASK        {at}.sparse_at (k,) int64, ascending in row-major W (out, in), {at}.sparse_values (k,)
    FASTFOOD                 {at}.fastfood_scale (), and with the first module {at}.fastfood_vector (d,)
    BITFIT, LINEAR_PROBE     the biases, and the head, under the base's own names
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafold.core.delta import Delta
from lorafold.core.layer import Base
from lorafold.io.format import Entries, Entry, Field, Method, Site, named
from lorafold.methods.bitfit import BitFit
from lorafold.methods.bottleneck import Bottleneck, BottleneckDelta
from lorafold.methods.fastfood import Fastfood, FastfoodDelta, Subspace
from lorafold.methods.probe import LinearProbe
from lorafold.methods.sparse import LTSFT, FishMask, SparseDelta

DENSITY = Field("density", "density", float, 0.005)

METHODS: tuple[Method, ...] = (
    Method(
        Bottleneck, "BOTTLENECK",
        (Field("size", "size", int, 64), Field("activation", "activation", str, "gelu"), Field("after", "after", str, "both")),
    ),
    Method(
        LTSFT, "LT_SFT", (DENSITY, Field("dense_steps", "dense_steps", int, 50), Field("dense_lr", "dense_lr", float, 5e-5)),
    ),
    Method(FishMask, "FISH_MASK", (DENSITY, Field("samples", "samples", int, 128))),
    Method(Fastfood, "FASTFOOD", (Field("dimension", "dimension", int, 1024), Field("seed", "seed", int, 0))),
    Method(BitFit, "BITFIT", ()),
    Method(LinearProbe, "LINEAR_PROBE", ()),
)  # fmt: skip


def not_positions(at: Tensor, site: Site, file: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the positions of a sparse delta's entries; how many there are is for the file to say."""
    out, inn = site.delta.shape  # type: ignore[misc]
    fine = at.dim() == 1 and at.dtype == torch.int64 and bool((at[1:] > at[:-1]).all())
    if fine and (not len(at) or (at[0] >= 0 and at[-1] < out * inn)):
        return None
    return f"expected ascending int64 positions in a weight of {out} x {inn}"


def not_values(values: Tensor, site: Site, file: Mapping[str, Tensor]) -> str | None:
    at = file.get(f"{site.at}.sparse_at")
    if not values.is_floating_point() or at is None or values.shape != at.shape:
        return f"shape {list(values.shape)}, expected a number for each position of sparse_at"
    return None


def sparse(delta: Delta, layer: type[Base]) -> list[Entry]:
    return [
        Entry("at", "{at}.sparse_at", misfit=not_positions),
        Entry("values", "{at}.sparse_values", misfit=not_values),
    ]


def subspace(delta: Delta, layer: type[Base]) -> list[Entry]:
    vector = [Entry("subspace.vector", "{at}.fastfood_vector")] if isinstance(delta.subspace, Subspace) else []
    return [Entry("scale", "{at}.fastfood_scale"), *vector]


TENSORS: dict[type[Delta], Entries] = {
    BottleneckDelta: named(
        down="{at}.bottleneck_down.weight", down_bias="{at}.bottleneck_down.bias",
        up="{at}.bottleneck_up.weight", up_bias="{at}.bottleneck_up.bias",
    ),
    SparseDelta: sparse,
    FastfoodDelta: subspace,
}  # fmt: skip
