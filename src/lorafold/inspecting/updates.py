"""Thin singular value decompositions of an adapter's updates, one module at a time.

    dW = U S V^T       U (out, k), S (k,) in descending order, V (in, k)

Each expert's matrix is decomposed separately and named as in `...gate_up_proj[3]`. A low-rank
update is decomposed from its factors (`ops.svd.svd_of_product`), in O((out + in) r^2); other
updates are built as dense matrices. Base weights stay memory-mapped until a figure needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.adapter import Adapter, attach, load_all
from lorafold.core.anatomy import grouped
from lorafold.core.delta import Delta, set_tensor
from lorafold.core.layer import Layer
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.fold.quantization_round_trip import ROUND_TRIP, attach_training_round_trip
from lorafold.inspecting.result import Sites
from lorafold.methods.lora import lora_with_ranks
from lorafold.ops.svd import svd_of_product
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base

# up (out, r), which includes every scale, and down (r, in); for experts (E, out, r) and (E, r, in);
# r = 0 for a zero update
Factors = tuple[Tensor, Tensor]
SiteFactors = Mapping[str, Factors]  # by module path
T = TypeVar("T")


@dataclass(frozen=True)
class Svd:
    """An SVD in fp32: U (out, k), S (k,) descending, V (in, k). Rounding errors are dropped."""

    u: Tensor
    s: Tensor
    v: Tensor

    def top(self, k: int) -> Svd:
        return Svd(self.u[:, :k], self.s[:k], self.v[:, :k])

    def factors(self, rank: int) -> Factors:
        """The best factors of at most this rank (Eckart and Young 1936); each is multiplied by the
        square root of the singular values.
        """
        root = self.s[:rank].sqrt()
        return self.u[:, :rank] * root, root[:, None] * self.v[:, :rank].t()

    def dense(self) -> Tensor:  # (out, in)
        return (self.u * self.s) @ self.v.t()


Svds = Mapping[str, Svd]  # by the name of the matrix


def matrix_names(path: str, matrices: Sequence[int]) -> list[str]:
    return [f"{path}[{e}]" for e in range(matrices[0])] if matrices else [path]


def module_path(name: str) -> str:
    return name.partition("[")[0]


def by_module(names: Iterable[str]) -> dict[str, list[str]]:
    return grouped((module_path(name), name) for name in names)


def group_experts(values: Mapping[str, T]) -> dict[str, list[T]]:
    """The values of experts' matrices by module; modules without experts are left out."""
    sites = {site: names for site, names in by_module(values).items() if names != [site]}
    return {site: [values[name] for name in names] for site, names in sites.items()}


def largest_of(figures: Sites) -> list[str]:
    """The name of one matrix per module: for experts, the matrix with the largest update."""
    return [max(names, key=lambda n: figures[n].base.norm) for names in by_module(figures).values()]


@dataclass(frozen=True)
class AdaptedModule:
    path: str
    delta: Delta
    layer: Layer

    @property
    def names(self) -> list[str]:
        return matrix_names(self.path, self.layer.matrices)

    def weights(self) -> dict[str, Tensor]:
        """W0 (out, in) by name, quantized as in training, with the base adapters merged."""
        return dict(zip(self.names, unstacked(self.layer.dense()[0].detach()), strict=True))

    @cached_property
    def rank(self) -> int | None:
        factors = self.delta.factors()
        return None if factors is None else factors[1].shape[-2]

    @property
    def changes_bias(self) -> bool:
        bias = self.layer.bias
        return (
            self.delta.factors() is None
            and bias is not None
            and self.delta.fold(self.layer.dense()[0].float(), bias)[1] is not bias
        )

    @torch.no_grad()
    def parts(self) -> Iterator[tuple[str, Svd]]:
        if (factors := self.delta.factors()) is not None:
            svds = map(svd_of_factors, *(unstacked(factor.detach()) for factor in factors))
            return zip(self.names, svds, strict=True)
        try:
            changes = unstacked(self.delta.change(self.layer.dense()[0].float()))
        except NotMergeable as e:
            raise LorafoldError(f"{self.path}: {e}") from None
        return zip(self.names, map(svd_of_dense, changes), strict=True)


def modules_of(adapter: Adapter, below: Sequence[str] = ()) -> Iterator[AdaptedModule]:
    """The modules that the adapter's method changes; biases and token embeddings are left out."""
    modules = adapter.sites
    for path, delta in adapter.own_deltas.items():
        layer = modules[path].layer(ROUND_TRIP, *below)
        try:
            _ = layer.shape
        except NotMergeable as e:
            raise LorafoldError(
                f"{path}: the adapter does not change a matrix ({e}), so its update has no singular"
                " values"
            ) from None
        yield AdaptedModule(path, delta, layer)


def load_below(model: nn.Module, base: Base, stack: Sequence[SavedAdapter]) -> tuple[str, ...]:
    """Loads all adapters of the stack except the last; returns their names on the model."""
    attach_training_round_trip(model, base.source, base.storage, stack)
    below = load_all(model, stack[:-1], "over", allow_other_base=base.allow_other_base)
    return tuple(adapter.name for adapter in below)


def unstacked(w: Tensor) -> Sequence[Tensor]:
    """The matrices of experts w (E, ., .) as views, or (w,) for a single matrix w (., .)."""
    return w.unbind() if w.dim() == 3 else (w,)


def pad_rank(factors: Factors, rank: int) -> Factors:
    up, down = factors
    return F.pad(up, (0, rank - up.shape[-1])), F.pad(down, (0, 0, 0, rank - down.shape[-2]))


def stacked(factors: Sequence[Factors], matrices: Sequence[int]) -> Factors:
    """A module's factors; factors of experts are padded to one rank and stacked."""
    if not matrices:
        return factors[0]
    rank = max(len(down) for _, down in factors)
    ups, downs = zip(*(pad_rank(pair, rank) for pair in factors), strict=True)
    return torch.stack(ups), torch.stack(downs)


@torch.no_grad()
def add_lora(model: nn.Module, factors: SiteFactors, name: str) -> Adapter:
    """Attaches a LoRA of scale 1 with these factors; rank 0 leaves a module unchanged."""
    spec = lora_with_ranks({path: max(down.shape[-2], 1) for path, (_, down) in factors.items()})
    adapter = attach(model, spec, Matches({path: (path,) for path in factors}), name)
    for path, delta in adapter.own_deltas.items():
        put_factors(delta, factors[path])
    return adapter


def put_factors(delta: Delta, factors: Factors) -> None:
    if factors[1].shape[-2]:
        for leaf, value in zip(("B", "A"), factors, strict=True):
            set_tensor(delta, leaf, value)


def svd_of_factors(up: Tensor, down: Tensor) -> Svd:  # (out, r), (r, in)
    """The SVD of up @ down, without computing the product."""
    with one_thread():
        u, s, vt = svd_of_product(up, down)
    return _significant(u, s, vt.t(), max(len(up), down.shape[1]) * torch.finfo(torch.float64).eps)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread, because two threads are 2 to 20 times as slow for many small SVDs
    when both cores are busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def svd_of_dense(dw: Tensor) -> Svd:  # (out, in)
    """The SVD of a matrix; a matrix on MPS is moved to the CPU first."""
    dw = dw.cpu() if dw.device.type == "mps" else dw
    u, s, vt = torch.linalg.svd(dw, full_matrices=False)
    return _significant(u, s, vt.t(), max(dw.shape) * torch.finfo(dw.dtype).eps)


def _significant(u: Tensor, s: Tensor, v: Tensor, share: float) -> Svd:
    """Drops singular values below `share` of the largest, which are rounding errors."""
    k = int((s > share * s[0]).sum())
    return Svd(u[:, :k].float(), s[:k].float(), v[:, :k].float())
