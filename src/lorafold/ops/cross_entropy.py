"""Cross-entropy over a large vocabulary, with logits for only CHUNK positions at a time.

    loss_i = -log softmax(f(h_i))[y_i],   h (n, d) hidden states, f a head, y (n,) targets

- `linear_cross_entropy` returns the loss of each position under a frozen linear head. The gradient
  in h_i depends on loss_i alone, so the forward pass computes it.
- `head_cross_entropy` returns the sum under any head f. The forward pass computes all gradients.
- `head_losses` returns the loss of each position under any head. The weights of the positions are
  known only in the backward pass, which therefore computes each chunk again.

The gradient of a chunk's logits z (m, V) overwrites them:

    loss_i = log sum_j exp(z_ij) - z_iy        y = targets_i
    gu_ij  = scale (p_ij - [j = y]) (1 - (z_ij / cap)^2)
                                               p = softmax(z), z = cap tanh(scale u / cap); without
                                               a cap z = scale u, and the last factor is 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lorafold.ops.arithmetic import matmul_dtype
from lorafold.ops.autocast import Exact, at_least_fp32
from lorafold.ops.operators import operator

CHUNK = 256  # positions whose logits exist at a time
SLAB_ELEMENTS = 2**22  # elements of W that are converted at a time: 16 MB


def chunks(n: int) -> list[slice]:
    return [slice(at, at + CHUNK) for at in range(0, n, CHUNK)]


def _scaled(gradient: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient * g, computed in g's precision: in bf16, the factor 1 / n of a mean would be
    off by up to 0.4%.
    """
    return (gradient.to(g.dtype) * g).to(dtype)


class _HeadCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        runs: Sequence[slice],
        *leaves: Tensor,
    ) -> Tensor:
        into_h = ctx.needs_input_grad[0]
        total = h.new_zeros((), dtype=at_least_fp32(h))
        tensors = (h, *leaves) if into_h else leaves
        wide = [at_least_fp32(t) for t in tensors]
        grads = [torch.zeros_like(t, dtype=dtype) for t, dtype in zip(tensors, wide, strict=True)]
        for rows in runs:
            with torch.set_grad_enabled(bool(grads)):
                x = h[rows].detach().requires_grad_(into_h)
                loss = F.cross_entropy(head(x).to(total.dtype), targets[rows], reduction="sum")
            total += loss.detach()
            if not grads:
                continue
            inputs = (x, *leaves) if into_h else leaves
            totals = [grads[0][rows], *grads[1:]] if into_h else grads
            chunk = torch.autograd.grad(loss, inputs, allow_unused=True)
            for grad, g in zip(totals, chunk, strict=True):
                if g is not None:
                    grad += g
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t.dtype for t in (h, *leaves)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        grads = list(ctx.saved_tensors)
        gh = _scaled(grads.pop(0), g, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        of_leaves = zip(grads, ctx.dtypes[1:], strict=True)
        return gh, None, None, None, *(_scaled(p, g, dtype) for p, dtype in of_leaves)


def head_losses(
    h: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], temperature: float = 1.0
) -> Tensor:
    """Returns the cross-entropy of each position, (n,) in fp32 or wider, for h (n, d) and targets
    (n,). h and the tensors of the head get gradients.
    """

    def losses(h: Tensor, targets: Tensor) -> Tensor:
        logits = head(h).to(at_least_fp32(h))
        if temperature != 1:  # rounds as sampling does
            logits = (logits - logits.amax(-1, True)) / temperature
        return F.cross_entropy(logits, targets, reduction="none")

    # with no positions, an empty chunk makes the gradients 0
    parts = [
        checkpoint(losses, h[run], targets[run], use_reentrant=False)
        for run in chunks(len(h)) or [slice(0, 0)]
    ]
    return torch.cat(parts)


def head_cross_entropy(
    h: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    leaves: Sequence[Tensor],
    runs: Sequence[slice],
) -> Tensor:
    """Returns the summed cross-entropy, a scalar in fp32 or wider, for h (n, d) and targets (n,).
    Only h and `leaves` get gradients.
    """
    return _HeadCrossEntropy.apply(h, targets, head, runs, *leaves)


class LinearHead(NamedTuple):
    """f(h) = cap * tanh(scale * (W h + b) / cap) with frozen W (V, d) and b (V,), and without the
    tanh if cap is None.
    """

    w: Tensor
    b: Tensor | None
    scale: float
    cap: float | None

    def logits(self, h: Tensor, out: Tensor | None = None, slab: Tensor | None = None) -> Tensor:
        """Returns the logits (n, V) of h (n, d), in the dtype of the matmul; written to `out` (at
        least n rows, V) if given.
        """
        wide = h.to(matmul_dtype(h) if out is None else out.dtype)
        z = wide.new_empty(len(h), len(self.w)) if out is None else out[: len(h)]
        slab = self.new_slab(wide) if slab is None else slab
        for rows, w in self.slabs(slab):
            torch.mm(wide, w.t(), out=z[:, rows])
        if self.b is not None:
            z.add_(self.b)
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def new_slab(self, like: Tensor) -> Tensor:
        """Returns a buffer (m, d) for rows of W in the dtype of `like`; m is 0 if W has that dtype.
        """
        size = 0 if like.dtype is self.w.dtype else max(1, SLAB_ELEMENTS // self.w.shape[1])
        return like.new_empty(size, self.w.shape[1])

    def slabs(self, slab: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of the rows of W, each with these rows (m, d) in the slab's dtype. Each
        part overwrites the previous one in the slab; with an empty slab, W is a single part.
        """
        if not len(slab):
            yield slice(0, len(self.w)), self.w
            return
        for at in range(0, len(self.w), len(slab)):
            w = self.w[at : at + len(slab)]
            yield slice(at, at + len(w)), slab[: len(w)].copy_(w)


def _kernel(
    h: Tensor,
    targets: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: float,
    cap: float | None,
    gradient: Tensor,
    logits: Tensor,
    block: Tensor,
    slab: Tensor,
) -> Tensor:
    """Returns the losses (n,), and writes the gradient of h to `gradient` (n, d), unless it is (0,
    d).

    The working memory is passed in, so that an estimate on fake tensors counts it: logits (CHUNK,
    V), block (BLOCK, V) in fp32 or wider, and slab.
    """
    linear = LinearHead(w, b, scale, cap)
    losses = h.new_empty(len(h), dtype=block.dtype)
    for at in range(0, len(h), CHUNK):
        rows = slice(at, at + CHUNK)
        z = linear.logits(h[rows], logits, slab)
        LOSSES(z, targets[rows], losses[rows], block, scale, cap, len(gradient) > 0)
        if len(gradient):  # z contains the gradient of W h + b
            gh = z.new_zeros(len(z), w.shape[1])
            for part, w_part in linear.slabs(slab):
                gh.addmm_(z[:, part], w_part)
            gradient[rows] = gh
    return losses


KERNEL = operator(
    "linear_cross_entropy(Tensor h, Tensor targets, Tensor w, Tensor? b, float scale, float? cap,"
    " Tensor(a!) gradient, Tensor(b!) logits, Tensor(c!) block, Tensor(d!) slab) -> Tensor",
    _kernel,
    lambda h, *args: h.new_empty(len(h), dtype=at_least_fp32(h)),
)


class _LinearCrossEntropy(Exact):
    @staticmethod
    def forward(ctx: Any, h: Tensor, targets: Tensor, head: LinearHead) -> Tensor:
        gradient = h.new_empty(len(h) if ctx.needs_input_grad[0] else 0, h.shape[1])
        logits = h.new_empty(min(CHUNK, len(h)), len(head.w), dtype=matmul_dtype(h))
        wide = at_least_fp32(h)  # dtype of the losses and of their sums
        block = h.new_empty(min(BLOCK, len(h)), len(head.w), dtype=wide)
        slab = head.new_slab(logits)
        ctx.save_for_backward(gradient)
        return KERNEL(h, targets, *head, gradient, logits, block, slab)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient.to(g.dtype) * g[:, None]).to(gradient.dtype), None, None  # as `_scaled`


# the cross-entropy of each position, (n,) in fp32 or wider, for hidden states (n, d), which get
# gradients, and targets (n,)
linear_cross_entropy: Callable[[Tensor, Tensor, LinearHead], Tensor] = _LinearCrossEntropy.apply


BLOCK = 32  # positions with fp32 probabilities at a time, so that these stay in cache


def _losses(
    z: Tensor,
    targets: Tensor,
    losses: Tensor,
    block: Tensor,
    scale: float,
    cap: float | None,
    gradient: bool,
) -> None:
    """Writes the losses (m,) of logits z (m, V). With `gradient`, the gradient with respect to W h
    + b overwrites z.
    """
    blocks = (x.split(BLOCK) for x in (z, targets[:, None], losses))
    for z_block, y, loss in zip(*blocks, strict=True):
        p = z_block if z.dtype is loss.dtype else block[: len(z_block)].copy_(z_block)
        top, z_y = p.amax(-1), p.gather(1, y)[:, 0]
        # the derivative of the cap, 1 - (z / cap)^2
        slope = None if cap is None else (p / -cap).mul_(p).div_(cap).add_(1)
        torch.softmax(p, -1, out=p)
        # log sum exp(z) = top - log p(top), without another pass of exp
        torch.sub(top - p.amax(-1).log(), z_y, out=loss)
        if not gradient:
            continue
        p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
        if slope is not None:
            p.mul_(slope)
        if scale != 1.0:
            p.mul_(scale)
        if p is not z_block:
            z_block.copy_(p)


LOSSES = operator(
    "cross_entropy_(Tensor(a!) z, Tensor targets, Tensor(b!) losses, Tensor(c!) block, float scale,"
    " float? cap, bool gradient) -> ()",
    _losses,
    lambda *args: None,
)
