"""From how many rows on a product of this processor sums in one order, whatever their number.

    least = steady(kernel, x)       kernel(x[:n]) has the bits of kernel(x)[:n] for n >= least

A kernel has its own order of summation for few rows, where the processor's vectors would be half
empty, so that a request would compute other bits alone than in company. It is measured, since it
follows from the kernel, the shape and the processor together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.ops.arithmetic import FEW, arithmetic

# a block has FEW rows where no number of them has an order of its own. Each number up to it is
# tried: a kernel of blocks of 4 rows may sum 8 as it sums 12, and 9 otherwise
ROWS = (*range(1, FEW + 2), 40, 64, 100, 256)


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
            found = max(found, steady(lambda x, m=m: F.linear(x, m), x.to(each)))
    return found
