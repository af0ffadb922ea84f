"""Layers of modules with floating-point weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorafold.core.active_adapters import DropoutSite, dropout_site
from lorafold.core.layer import BaseLayer, add
from lorafold.errors import NotMergeable
from lorafold.ops.arithmetic import linear, matmul, matmul_dtype, scaled_as
from lorafold.ops.autocast import autocasting, lowered
from lorafold.ops.checkpoint_segments import computed_once
from lorafold.ops.dropout import dropout, shared_dropout
from lorafold.ops.frozen import frozen_linear, low_rank_linear, sparse_linear
from lorafold.ops.scale_and_add import scale_and_add


class Vectors(BaseLayer):
    """Abstract: a layer whose outputs are vectors (..., out)."""

    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        return scale_and_add(y, g, c, onto)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropout(x, p, self.site(x)) if p else x

    def site(self, x: Tensor) -> DropoutSite | None:
        """Returns the inputs of dropout's random numbers for x (..., k), or None if dropout uses
        torch's generator.
        """
        return dropout_site(self.module, x.shape[:-1].numel())


class Matrix(Vectors):
    """Abstract: a matrix that multiplies activations."""

    linear = True
    called = staticmethod(lowered)

    @abstractmethod
    def weight(self) -> Tensor:  # (out, in)
        """Returns W (out, in), if possible a view of the stored parameter."""

    def read(self, dtype: torch.dtype) -> Tensor:  # (out, in)
        """Returns W (out, in) for a matmul with activations of that dtype."""
        return self.weight().to(dtype)

    @property
    def frozen(self) -> bool:
        """Whether W gets no gradient."""
        return not self.weight().requires_grad

    @property
    def shape(self) -> tuple[int, int]:
        out, inn = self.weight().shape
        return out, inn

    def as_is(self, x: Tensor) -> bool:
        """Returns whether the module's own forward may compute W x + b for x (..., in)."""
        return matmul_dtype(x) is x.dtype is self.weight().dtype or autocasting(x)

    def biased(self, y: Tensor) -> Tensor:
        """Returns y + b (..., out), in y's dtype."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if onto is None and self.as_is(x):
            return self.run(x)
        if onto is None and not self.frozen:
            return linear(x, self.read(x.dtype), self.bias)
        flat = x.reshape(-1, x.shape[-1])
        start = (
            self.bias
            if onto is None
            else onto.expand(*x.shape[:-1], self.shape[0]).reshape(-1, self.shape[0])
        )
        if self.frozen and not torch.compiler.is_compiling():
            y = frozen_linear(flat, start, self.read)
        else:
            w = self.read(x.dtype)
            y = flat @ w.t() if start is None else torch.addmm(start.to(w.dtype), flat, w.t())
        y = y.view(*x.shape[:-1], -1)
        return y if onto is None else self.biased(y)

    def op(self, x: Tensor, m: Tensor) -> Tensor:
        return linear(x, m)

    def op_once(self, x: Tensor, m: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().op_once(x, m)
        flat, narrow = x.reshape(-1, x.shape[-1]), m[:, : x.shape[-1]]
        u = computed_once(x, (m,), lambda: frozen_linear(flat, None, narrow.to))
        return u.view(*x.shape[:-1], -1)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.weight(), self.bias

    def weight_times(self, m: Tensor) -> Tensor:
        w = self.weight()
        return matmul(w, scaled_as(m, 1.0, w.dtype).t(), m.dtype)

    def low_rank(
        self, x: Tensor, down: Tensor, up: Tensor, p: float, onto: Tensor | None, k: float = 1.0
    ) -> Tensor:
        if torch.compiler.is_compiling() or not self.frozen or onto is not None:
            return super().low_rank(x, down, up, p, onto, k)
        drop = shared_dropout(x, p, id(self.module), self.site(x)) if p else None
        return self.biased(low_rank_linear(x, self.read, down, up, drop, k))

    def sparse(self, x: Tensor, values: Tensor, at: Tensor, onto: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling() or not self.frozen:
            return super().sparse(x, values, at, onto)
        return self.biased(add(sparse_linear(x, self.read, values, at), onto))


class Linear(Matrix):
    """A linear module: weight (out, in)."""

    def weight(self) -> Tensor:
        return self.bare.weight

    def write(self, w: Tensor, b: Tensor | None) -> None:
        super().write(w, b)
        if hasattr(self.module, "out_features"):  # new tokens may have grown a head
            self.module.out_features = len(w)  # type: ignore[assignment]


class Conv1D(Matrix):
    """GPT-2's linear layer: weight (in, out)."""

    def weight(self) -> Tensor:
        return self.bare.weight.t()

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        return super().encode(w.t(), b)


class _Lookup(Function):
    """Looks up rows of a 16-bit W (V, d) with an fp32 gradient, because on a CPU torch would round
    the sum after each repetition of a token.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, w: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.size = padding, len(w)
        return F.embedding(ids, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        back = torch.ops.aten.embedding_dense_backward
        return None, back(g.float(), ids, ctx.size, ctx.padding, False), None


def lookup(ids: Tensor, w: Tensor, padding: int | None = None) -> Tensor:
    """Looks up rows of W (V, d): ids (...) -> (..., d). The row `padding` has no gradient."""
    rounds = w.requires_grad and w.itemsize == 2 and w.device.type == "cpu"
    if not rounds or torch.compiler.is_compiling():
        return F.embedding(ids, w, padding)
    return _Lookup.apply(ids, w, -1 if padding is None else padding)


class Embedding(Vectors):
    """An embedding: weight (in, out), with the vocabulary size as `in`; its product with ids is a
    lookup.
    """

    takes_ids = True
    called = staticmethod(lowered)

    def _scaled(self, y: Tensor) -> Tensor:
        # Gemma and BART scale their embeddings
        scale = getattr(self.module, "embed_scale", None)
        scale = scale.to(y.dtype) if isinstance(scale, Tensor) else scale
        return y if scale is None else y * scale

    @property
    def shape(self) -> tuple[int, int]:
        vocabulary, dim = self.bare.weight.shape
        return dim, vocabulary

    def __call__(self, ids: Tensor, onto: Tensor | None = None) -> Tensor:
        module = self.bare
        simple = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
        if simple and module.weight.requires_grad:
            y = self._scaled(lookup(ids, module.weight, module.padding_idx))
        else:
            y = self.run(ids)
        return add(y, onto).to(y.dtype)

    def op(self, ids: Tensor, m: Tensor) -> Tensor:
        return self._scaled(lookup(ids, m.t()))

    def drop(self, ids: Tensor, p: float) -> Tensor:
        return ids

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.bare.weight.t(), None

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        if b is not None:
            raise NotMergeable("the adapter adds a bias, which an embedding can't store")
        return {"weight": w.t()}

    def write(self, w: Tensor, b: Tensor | None) -> None:
        super().write(w, b)
        if hasattr(self.module, "num_embeddings"):  # new tokens may have grown it
            self.module.num_embeddings = w.shape[1]  # type: ignore[assignment]


class Plain(Vectors):
    """Any other module; its weight and bias, if any, are elementwise."""

    @property
    def shape(self) -> tuple[int, int]:
        why = "is a transposed convolution, which is not supported" * isinstance(
            self.module, nn.modules.conv._ConvTransposeNd
        )
        raise NotMergeable(f"{type(self.module).__name__} {why or 'has no weight matrix'}")

    def __call__(self, *args: Any, onto: Tensor | None = None, **kwargs: Any) -> Any:
        y = self.run(*args, **kwargs)
        return y if onto is None else (y + onto).to(y.dtype)

    def op(self, x: Tensor, m: Tensor) -> Tensor:
        raise NotMergeable(f"{type(self.module).__name__} has no weight matrix")

    def dense(self) -> tuple[Tensor, Tensor | None]:
        weight = getattr(self.bare, "weight", None)
        if weight is None:
            raise NotMergeable(f"{type(self.module).__name__} has no weight")
        return weight, getattr(self.bare, "bias", None)
