"""The updates of a saved adapter, one module at a time, as thin singular value decompositions.

    dW = U S V^T       U (out, k), S (k,) falling, V (in, k)

Factors are never multiplied out (`ops.svd.svd_of_product`): O((out + in) r^2) instead of O(out in
min(out, in)). Where there are none dW is built and decomposed whole, one module at a time. The
base's weights stay in their files, mapped, until a figure needs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorafold.adapter import Adapter
from lorafold.bases import layer_of
from lorafold.core.delta import Delta
from lorafold.core.layer import Base
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.ops.svd import svd_of_product


@dataclass(frozen=True)
class Svd:
    """U (out, k), S (k,) falling, V (in, k), fp32; singular values that are only rounding are left
    out.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def top(self, k: int) -> Svd:
        return Svd(self.u[:, :k], self.s[:k], self.v[:, :k])

    def copied(self) -> Svd:
        """In memory of its own, so that what it was cut from can go."""
        return Svd(self.u.clone(), self.s.clone(), self.v.clone())

    def dense(self) -> Tensor:  # (out, in)
        return (self.u * self.s) @ self.v.t()


@dataclass(frozen=True)
class Site:
    """One module and what is laid on it.

    `rank` is the method's nominal rank, None for a method without factors.
    """

    path: str
    delta: Delta
    layer: Base

    @property
    def weight(self) -> Tensor:  # (out, in), fp32: read from the file each time
        return self.layer.dense()[0].detach().float()

    @cached_property
    def rank(self) -> int | None:
        factors = self.delta.factors()
        return None if factors is None else len(factors[1])

    @property
    def changes_bias(self) -> bool:
        """Does folding it change the layer's bias as well?"""
        bias = self.layer.bias
        return (
            self.delta.factors() is None
            and bias is not None
            and self.delta.fold(self.weight, bias)[1] is not bias
        )

    def parts(self) -> Svd:
        """Made anew each time. LorafoldError for an update that has no form in weight space."""
        return svd_of(self.delta, self.layer, self.path)


def sites(adapter: Adapter) -> Iterator[Site]:
    """What the method itself laid, by module; trained biases, modules to save and token rows are no
    part of it.

    LorafoldError where the method has no update of a matrix.
    """
    for path, delta in adapter.own_deltas.items():
        layer = layer_of(adapter.model.get_submodule(path))
        try:
            _ = layer.shape
        except NotMergeable as e:
            raise LorafoldError(
                f"{path}: {type(delta).__name__} changes no matrix ({e}), so it has no spectrum"
            ) from None
        yield Site(path, delta, layer)


@torch.no_grad()
def svd_of(delta: Delta, layer: Base, path: str) -> Svd:
    if (factors := delta.factors()) is not None:
        return of_factors(*factors)
    try:
        return of_dense(delta.change(layer.dense()[0].float()))
    except NotMergeable as e:
        raise LorafoldError(f"{path}: {e}") from None


def of_factors(up: Tensor, down: Tensor) -> Svd:  # (out, r), (r, in)
    with one_thread():
        u, s, vt = svd_of_product(up, down)
    return kept(u, s, vt.t(), max(len(up), down.shape[1]) * torch.finfo(torch.float64).eps)


@contextmanager
def one_thread() -> Iterator[None]:
    """Thin products gain nothing from threads, which wait for each other: 224 sites of Llama-2-7B
    at r=16 take 2 s on one and, where other work keeps a processor of two cores busy, from 4 to 49
    s on two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def of_dense(dw: Tensor) -> Svd:  # (out, in)
    u, s, vt = torch.linalg.svd(dw, full_matrices=False)
    return kept(u, s, vt.t(), max(dw.shape) * torch.finfo(dw.dtype).eps)


def kept(u: Tensor, s: Tensor, v: Tensor, share: float) -> Svd:
    k = int((s > share * s[0]).sum())
    return Svd(u[:, :k].float(), s[:k].float(), v[:, :k].float())
