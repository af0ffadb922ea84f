"""From how many rows on a product has the bits that it has with more: each number is tried, since
a kernel that works in blocks sums the rows that are left over in an order of their own.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.engine.operations import ROWS, InBlocks, plain_products, random_rows, steady
from lorafold.ops.arithmetic import FEW, multiplying


@pytest.mark.parametrize("odd", [*range(1, FEW + 1)])
def test_one_number_of_rows_that_is_summed_otherwise_is_found(odd: int) -> None:
    def kernel(x: Tensor) -> Tensor:
        a, b, c = x.unbind(-1)
        return a + (b + c) if len(x) == odd else (a + b) + c

    assert steady(kernel, random_rows(3, torch.float32)) == odd + 1


def test_a_kernel_that_never_settles_has_the_last_number() -> None:
    assert steady(lambda x: x / len(x), random_rows(64, torch.float32)) == ROWS[-1]


@pytest.mark.parametrize("widened", [False, True])
def test_products_of_this_processor_keep_their_bits_from_there_on(widened: bool) -> None:
    shapes = [(96, 576), (576, 96)]
    with multiplying(widened=widened, rows=1):
        least = plain_products(shapes, torch.bfloat16)
    assert 1 <= least <= ROWS[-1]
    for out, inn in shapes if least <= FEW else ():
        x = random_rows(inn, torch.float32 if widened else torch.bfloat16)
        m = x.repeat(-(-out // len(x)), 1)[:out]
        whole = F.linear(x, m)
        for n in range(least, 4 * FEW):
            for start in (0, 1, len(x) - n):
                own = F.linear(x[start : start + n], m)
                assert torch.equal(own, whole[start : start + n]), (out, inn, n, start)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_blocks_no_product_depends_on_the_number_of_rows(
    dtype: torch.dtype, inference: bool
) -> None:
    m = random_rows(1536, dtype)[:96]
    many = random_rows(1536, dtype)
    b, onto = many[0, :96], many[:, :96]

    def products(x: Tensor, onto: Tensor) -> list[Tensor]:
        inplace = onto.clone().addmm_(x, m.t())
        batched = F.linear(x.view(1, len(x), -1), m)[0]
        return [x @ m.t(), F.linear(x, m, b), torch.addmm(onto, x, m.t()), inplace, batched]

    with torch.inference_mode(inference), InBlocks(FEW):
        whole = products(many, onto)
        for n in (1, 2, 7, 16, 17, 33, 128, 200):
            for start in (0, len(many) - n):
                rows = slice(start, start + n)
                for own, of_all in zip(products(many[rows], onto[rows]), whole, strict=True):
                    assert torch.equal(own, of_all[rows]), (n, start)
    expected = products(many, onto)
    for own, of_torch in zip(whole, expected, strict=True):
        torch.testing.assert_close(own, of_torch, rtol=2e-2, atol=2e-2 * float(of_torch.std()))
