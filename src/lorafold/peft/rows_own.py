"""Rows of the table: methods that PEFT lacks, in its layout under a peft_type of our own.

    BOTTLENECK               {at}.bottleneck_down.weight (m, d), .bias (m,),
                             {at}.bottleneck_up.weight (d, m), .bias (d,)
    LT_SFT, FISH_MASK        {at}.sparse_at (k,) int64, ascending in row-major W (out, in),
                             {at}.sparse_values (k,)
    FASTFOOD                 {at}.fastfood_scale (), and with the first module {at}.fastfood_vector
                             (d,)
    MIXTURE                  {at}.mixture_up (out, R), .mixture_down (R, in), .mixture_owner (R,)
                             int64; {at}.mixture_gates (n,), or
                             once base_model.mixture_gates, or {at}.mixture_router (n, in)
    BITFIT, LINEAR_PROBE     the biases, and the head, under the base's own names

Their keys are the fields of their specs. These files were written before methods without a row had
one that is derived, so that their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from lorafold.core.delta import Delta
from lorafold.methods.bitfit import BitFit
from lorafold.methods.bottleneck import Bottleneck, BottleneckDelta
from lorafold.methods.fastfood import Fastfood, FastfoodDelta, Subspace
from lorafold.methods.parts.mixture import GATES, Mixture, MixtureDelta, RoutedDelta
from lorafold.methods.probe import LinearProbe
from lorafold.methods.sparse import LTSFT, FishMask, SparseDelta
from lorafold.peft import derived
from lorafold.peft.format import Entries, Entry, Method, Site, named

METHODS: tuple[Method, ...] = (
    derived.method(Bottleneck, "BOTTLENECK"),
    derived.method(LTSFT, "LT_SFT"),
    derived.method(FishMask, "FISH_MASK"),
    derived.method(Fastfood, "FASTFOOD"),
    derived.method(Mixture, "MIXTURE"),
    derived.method(BitFit, "BITFIT"),
    derived.method(LinearProbe, "LINEAR_PROBE"),
)


def not_positions(at: Tensor, site: Site, file: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the positions of a sparse delta's entries, or None. The file decides how
    many there are.

    Args:
        at: The positions (k,) in a weight in row-major order.
        site: The delta with its module path.
        file: All tensors of the file that belong to the adapter.
    """
    shape: tuple[int, ...] = site.delta.shape  # type: ignore[assignment]
    fine = at.dim() == 1 and at.dtype == torch.int64 and bool((at[1:] > at[:-1]).all())
    if fine and (not len(at) or (at[0] >= 0 and at[-1] < prod(shape))):
        return None
    return f"expected ascending int64 positions in a weight of {' x '.join(map(str, shape))}"


def not_values(values: Tensor, site: Site, file: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the values of a sparse delta's entries, or None.

    Args:
        values: The values (k,), one for each position.
        site: The delta with its module path.
        file: All tensors of the file that belong to the adapter.
    """
    at = file.get(f"{site.at}.sparse_at")
    if not values.is_floating_point() or at is None or values.shape != at.shape:
        return f"shape {list(values.shape)}, expected a number for each position of sparse_at"
    return None


def sparse(site: Site) -> list[Entry]:
    """The tensors of a sparse delta: positions and values."""
    return [
        Entry("at", "{at}.sparse_at", misfit=not_positions),
        Entry("values", "{at}.sparse_values", misfit=not_values),
    ]


def subspace(site: Site) -> list[Entry]:
    """The tensors of a Fastfood delta: its scale and, at the first module, the shared vector."""
    own = isinstance(site.delta.subspace, Subspace)
    vector = [Entry("subspace.vector", "{at}.fastfood_vector")] * own
    return [Entry("scale", "{at}.fastfood_scale"), *vector]


def not_owners(owner: Tensor, site: Site, file: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the numbers of the adapters that a mixture's columns belong to, or None.
    The file decides how many there are.

    Args:
        owner: The numbers (R,).
        site: The delta with its module path.
        file: All tensors of the file that belong to the adapter.
    """
    n: int = site.delta.n  # type: ignore[assignment]
    if owner.dim() == 1 and owner.dtype == torch.int64 and bool(((owner >= 0) & (owner < n)).all()):
        return None
    return f"expected int64 numbers of {n} adapters, from 0"


def not_frozen(dim: int) -> Callable[[Tensor, Site, Mapping[str, Tensor]], str | None]:
    """The check of a mixture's factors, up (*matrices, out, R) or down (*matrices, R, in):
    dimension `dim`, -1 or -2, has a column for each owner, and the others are those of the layer.
    """

    def misfit(factor: Tensor, site: Site, file: Mapping[str, Tensor]) -> str | None:
        owner = file.get(f"{site.at}.mixture_owner")
        laid: Any = site.delta
        expected = list((laid.up if dim == -1 else laid.down).shape)
        expected[dim] = -1 if owner is None else owner.numel()
        if factor.is_floating_point() and list(factor.shape) == expected:
            return None
        del expected[dim]
        return (
            f"shape {list(factor.shape)}, expected a factor with"
            f" {' and '.join(map(str, expected))} in dimension"
            f" {' and '.join(str(i) for i in range(factor.dim()) if i != dim % factor.dim())} and"
            " the owners' number in the other"
        )

    return misfit


def mixture(site: Site) -> list[Entry]:
    """The frozen factors of a mixture, and which adapter each column belongs to."""
    return [
        Entry("up", "{at}.mixture_up", misfit=not_frozen(-1)),
        Entry("down", "{at}.mixture_down", misfit=not_frozen(-2)),
        Entry("owner", "{at}.mixture_owner", misfit=not_owners),
    ]


def gated(site: Site) -> list[Entry]:
    """The tensors of a mixture with gates, which are in the file once if they are shared."""
    delta = site.delta
    key = GATES if delta.gates.shared else "{at}.mixture_gates"  # type: ignore[union-attr]
    # shared ones are there once
    return [*mixture(site), *[Entry("gates.values", key)] * ("gates" in delta._modules)]


def routed(site: Site) -> list[Entry]:
    """The tensors of a mixture with a router."""
    return [*mixture(site), Entry("router", "{at}.mixture_router")]


TENSORS: dict[type[Delta], Entries] = {
    BottleneckDelta: named(
        down="{at}.bottleneck_down.weight", down_bias="{at}.bottleneck_down.bias",
        up="{at}.bottleneck_up.weight", up_bias="{at}.bottleneck_up.bias",
    ),
    SparseDelta: sparse,
    FastfoodDelta: subspace,
    MixtureDelta: gated,
    RoutedDelta: routed,
}  # fmt: skip
