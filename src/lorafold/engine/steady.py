"""From how many rows on a product of this processor sums in one order, whatever their number.

    least = steady(kernel, x)       kernel(x[:n]) has the bits of kernel(x)[:n] for n >= least
    with InBlocks(16): ...          every product of matrices takes 16 rows at a time, so that it
                                    has the same bits where no number of rows is steady

A kernel has its own order of summation for few rows, where the processor's vectors would be half
empty, so that a request would compute other bits alone than in company. It is measured, since it
follows from the kernel, the shape and the processor together.

`as_trained` makes the engine's numbers bit-identical to training's: attention runs the kernel of
packed documents, so a query sums over its keys in a document's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafold.kernels.table import TRAINING, use
from lorafold.ops.arithmetic import FEW, arithmetic
from lorafold.ops.attention import FORWARD, Scores
from lorafold.ops.decoding import ATTEND
from lorafold.ops.documents import Documents

# a block has FEW rows where no number of them has an order of its own. Each number up to it is
# tried: a kernel of blocks of 4 rows may sum 8 as it sums 12, and 9 otherwise
ROWS = (*range(1, FEW + 2), 40, 64, 100, 256)
WIDE = 4096  # rows of a matrix that are enough to tell: a head has many times as many


def steady(kernel: Callable[..., Tensor], *given: Tensor) -> int:
    """The least number of rows; the last of ROWS if there is none.

    Args:
        kernel: computes rows (n, ...) from those of each of the inputs.
        given: the inputs, with as many rows as the last of ROWS.
    """
    whole, least = kernel(*given), ROWS[-1]
    for n in reversed(ROWS[:-1]):
        starts = range(0, max(FEW - n + 1, 1), n)
        for s in starts:
            if not torch.equal(kernel(*(t[s : s + n] for t in given)), whole[s : s + n]):
                return least
        least = n
    return least


def random_rows(width: int, dtype: torch.dtype) -> Tensor:
    """As many random rows (n, width) as `steady` takes, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS[-1], width, generator=generator).to(dtype)


def plain_products(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> int:
    """The same for torch's own products with matrices (out, in) of these shapes, in the dtype and
    in the one in which `lorafold.ops.arithmetic` multiplies it.
    """
    found = 1
    for out, inn in shapes:
        x = random_rows(inn, dtype)
        for each in {dtype, arithmetic(x)}:
            m = random_rows(inn, each).repeat(-(-out // ROWS[-1]), 1)[:out]
            wide = x.to(each)
            # 16 bits hide most differences of a sum, but not those of what rounding takes away
            left = -F.linear(wide, m)
            kernels = (lambda x, _, m=m: F.linear(x, m)), (lambda x, y, m=m: y.addmm(x, m.t()))
            found = max(found, *(steady(kernel, wide, left) for kernel in kernels))
    return found


class InBlocks(TorchDispatchMode):
    """Products of matrices (n, k) with (k, m) in the `with` block are computed so many rows at a
    time, the last ones with their first row repeated.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        aten, kwargs = torch.ops.aten, dict(kwargs or {})
        if func in (aten.linear.default, aten.matmul.default):
            with self:  # in inference mode they are seen before they are taken apart
                return func.decompose(*args, **kwargs)
        if func is aten.mm.default:
            return self._blocks(torch.mm, args[:1], args[1:], kwargs)
        if func is aten.addmm.default and args[0].dim() == 2 and len(args[0]) == len(args[1]):
            return self._blocks(torch.addmm, args[:2], args[2:], kwargs)
        if func is aten.addmm.default:

            def added(x: Tensor, *rest: Any, **options: Any) -> Tensor:
                return torch.addmm(args[0], x, *rest, **options)

            return self._blocks(added, args[1:2], args[2:], kwargs)
        if func is aten.addmm_.default:
            return args[0].copy_(self._blocks(torch.addmm, args[:2], args[2:], kwargs))
        return func(*args, **kwargs)

    def _blocks(
        self, product: Callable[..., Tensor], of_rows: Any, rest: Any, options: Any
    ) -> Tensor:
        n = len(of_rows[0])
        more = -n % self.rows
        blocks = [
            torch.cat([t, t[:1].expand(more, -1)]).split(self.rows) if more else t.split(self.rows)
            for t in of_rows
        ]
        parts = [product(*block, *rest, **options) for block in zip(*blocks, strict=True)]
        return torch.cat(parts)[:n] if len(parts) > 1 or more else parts[0]


def lacks(device: str) -> str:
    """Why passes on a kind of device can't have training's numbers, or nothing."""
    return use(TRAINING) if device == "cpu" else f"found a model on {device}, expected one on a CPU"


def unsteady(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> bool:
    """Whether products with matrices (out, in) of these shapes depend on the number of rows on this
    processor, even where that is FEW.
    """
    return plain_products({(min(out, WIDE), inn) for out, inn in shapes}, dtype) > FEW


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention (B, T, H, Dv) of slots, in the order of documents. What sees other keys than all up
    to its own, as in a window, is computed by `lorafold.ops.decoding.ATTEND`.

    Args:
        q: the queries (B, H, T, D).
        k, v: the keys and values (B, Hk, K, D) and (B, Hk, K, Dv).
        mask: (B, 1, T, K), 0 or -inf, which is added to the scores.
        scale: the factor of the scores.
    """
    rows, heads, tokens, _ = q.shape
    at = torch.arange(k.shape[2])
    lens = (mask[:, 0] == 0).sum(-1)  # (B, T)
    causal = torch.equal(mask[:, 0] == 0, at < lens[..., None])
    if not causal or not torch.equal(lens, lens[:, :1] + torch.arange(tokens)):
        y: Tensor = ATTEND.on(q.device.type)(q, k, v, mask, scale)
        return y
    starts, ends = (lens[:, 0] - 1).tolist(), lens[:, -1].tolist()
    row, key = (at < lens[:, -1:]).nonzero(as_tuple=True)
    docs = Documents(tuple(ends), None, tuple(starts))
    flat = q.transpose(1, 2).reshape(rows * tokens, heads, -1)
    out: Tensor = FORWARD(flat, k[row, :, key], v[row, :, key], docs, Scores(scale, None))
    return out.view(rows, tokens, heads, -1)
