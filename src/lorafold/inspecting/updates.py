"""The updates of an adapter, one module at a time, as thin singular value decompositions.

    dW = U S V^T       U (out, k), S (k,) in descending order, V (in, k)

A product of factors is decomposed from its factors (`ops.svd.svd_of_product`), which takes O((out +
in) r^2) instead of O(out in min(out, in)). Other updates are built as dense matrices, one module at
a time. The base's weights stay in their mapped files until a figure needs one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafold.adapter import Adapter, load
from lorafold.core.delta import Delta
from lorafold.core.layer import Layer
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.ops.svd import svd_of_product


@dataclass(frozen=True)
class Svd:
    """U (out, k), S (k,) in descending order and V (in, k) in fp32. Singular values below the
    rounding error are left out.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def top(self, k: int) -> Svd:
        """The first k directions, as views."""
        return Svd(self.u[:, :k], self.s[:k], self.v[:, :k])

    def copied(self) -> Svd:
        """A copy, so that the memory of a larger decomposition can be freed."""
        return Svd(self.u.clone(), self.s.clone(), self.v.clone())

    def dense(self) -> Tensor:  # (out, in)
        """U S V^T."""
        return (self.u * self.s) @ self.v.t()


@dataclass(frozen=True)
class Site:
    """One module, with the delta that is attached to it."""

    path: str
    delta: Delta
    layer: Layer

    @property
    def weight(self) -> Tensor:  # (out, in)
        """W0 in fp32, read from the file each time; with the adapters below in it, if there are
        any.
        """
        return self.layer.dense()[0].detach().float()

    @cached_property
    def rank(self) -> int | None:
        """The nominal rank, or None for a delta without factors."""
        factors = self.delta.factors()
        return None if factors is None else len(factors[1])

    @property
    def changes_bias(self) -> bool:
        """Whether folding changes the layer's bias too."""
        bias = self.layer.bias
        return (
            self.delta.factors() is None
            and bias is not None
            and self.delta.fold(self.weight, bias)[1] is not bias
        )

    def parts(self) -> Svd:
        """The SVD of the update, computed each time. Raises LorafoldError for an update without a
        form in weight space.
        """
        return svd_of(self.delta, self.layer, self.path)


def sites(adapter: Adapter, below: Sequence[str] = ()) -> Iterator[Site]:
    """The modules with the deltas of the adapter's method, without trained biases, modules to save
    and embeddings of tokens.

    Raises LorafoldError where the method does not change matrices.

    Args:
        adapter: The adapter.
        below: The names of the adapters that it lies over, lowest first.
    """
    modules = adapter.sites
    for path, delta in adapter.own_deltas.items():
        layer = modules[path].layer(*below)
        try:
            _ = layer.shape
        except NotMergeable as e:
            raise LorafoldError(
                f"{path}: {type(delta).__name__} does not change a matrix ({e}), so it has no"
                " spectrum"
            ) from None
        yield Site(path, delta, layer)


def load_below(
    model: nn.Module, over: Sequence[str | Path], allow_other_base: bool
) -> tuple[str, ...]:
    """Load adapters as the base of another one, and return their names on the model, lowest first.

    Args:
        model: The base.
        over: The adapters, lowest first.
        allow_other_base: Accept adapters whose fingerprint names another base.
    """
    names = tuple(f"over{n}" for n, _ in enumerate(over, 1))
    for name, path in zip(names, over, strict=True):
        load(model, path, name, allow_other_base=allow_other_base)
    return names


@torch.no_grad()
def svd_of(delta: Delta, layer: Layer, path: str) -> Svd:
    """The SVD of a delta's update.

    Args:
        delta: From its factors, if it has them.
        layer: The layer that it changes.
        path: The module path, for the message of an error.

    Raises LorafoldError for a delta without a form in weight space.
    """
    if (factors := delta.factors()) is not None:
        return of_factors(*factors)
    try:
        return of_dense(delta.change(layer.dense()[0].float()))
    except NotMergeable as e:
        raise LorafoldError(f"{path}: {e}") from None


def of_factors(up: Tensor, down: Tensor) -> Svd:  # (out, r), (r, in)
    """The SVD of up @ down, which is never computed."""
    with one_thread():
        u, s, vt = svd_of_product(up, down)
    return kept(u, s, vt.t(), max(len(up), down.shape[1]) * torch.finfo(torch.float64).eps)


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch uses one thread. Thin products gain nothing from more, which wait
    for each other: 224 sites of Llama-2-7B at r=16 take 2 s with one thread and, on two busy cores,
    4 to 49 s with two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def of_dense(dw: Tensor) -> Svd:  # (out, in)
    """The SVD of a matrix."""
    u, s, vt = torch.linalg.svd(dw, full_matrices=False)
    return kept(u, s, vt.t(), max(dw.shape) * torch.finfo(dw.dtype).eps)


def kept(u: Tensor, s: Tensor, v: Tensor, share: float) -> Svd:
    """The singular values above the rounding error, with their vectors, in fp32.

    Args:
        u: (out, k).
        s: (k,), in descending order.
        v: (in, k).
        share: The rounding error relative to the largest singular value.
    """
    k = int((s > share * s[0]).sum())
    return Svd(u[:, :k].float(), s[:k].float(), v[:, :k].float())
