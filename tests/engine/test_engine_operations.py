"""The engine's operations in C++, against torch in fp64, and alone against in company."""

import itertools
import shutil
import sys
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.engine.operations import (
    ROWS,
    InBlocks,
    Operations,
    available,
    plain_products,
    random_rows,
    steady,
)
from lorafold.files.cache import entries
from lorafold.kernels.registry import DECODING, FORMS, _forms, use
from lorafold.ops.arithmetic import FEW, multiplying
from lorafold.ops.decoding import SlotFactors
from lorafold.ops.operators import Operation, plainly

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def native() -> Operations:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    if why := use(DECODING):
        pytest.skip(why)
    return Operations("cpu")


def close(found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """At most twice as far from the values in fp64 as torch's result is, or a rounding."""
    assert found.dtype == plain.dtype
    assert found.shape == expected.shape
    wide = expected.double()
    allowed = max(
        float(2 * (plain.double() - wide).norm()),
        float(torch.finfo(found.dtype).eps * wide.norm()),
    )
    assert float((found.double() - wide).norm()) <= allowed


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "rank", "width"), [(64, 16, 96), (37, 3, 51), (96, 1, 64)])
def test_low_rank(native: Operations, dtype: torch.dtype, n: int, rank: int, width: int) -> None:
    down, up = random(5, rank, n, dtype=dtype), random(5, rank, width, dtype=dtype, seed=1)
    ranks = torch.tensor([rank, 1, rank, 0, rank])
    for slot, r in enumerate(ranks.tolist()):
        down[slot, r:], up[slot, r:] = 0, 0
    other = random(5, 2, n, dtype=dtype, seed=3), random(5, 2, 33, dtype=dtype, seed=4)
    slots = torch.tensor([0, 1, 4, 3, 4, 1, 1])
    x = random(7, 3, n, dtype=dtype, seed=2)

    def product(operations: Operations, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        parts = [
            SlotFactors(down.to(dtype), up.to(dtype), ranks, width),
            SlotFactors(None, None, torch.zeros(5, dtype=torch.long), 7),
            SlotFactors(other[0].to(dtype), other[1].to(dtype), torch.full((5,), 2), 33),
        ]
        return operations.low_rank(parts, slots[rows])(x[rows].to(dtype))

    found = product(native, dtype, slice(None))
    wide = product(Operations(), torch.float64, slice(None))
    close(found, wide, product(Operations(), dtype, slice(None)))
    assert not found[3, :, :width].any()
    assert not found[..., width : width + 7].any()
    for b in range(7):  # the bits are the same alone, and a token at a time
        assert torch.equal(product(native, dtype, slice(b, b + 1))[0], found[b])
    x = x[:, 1:2]
    assert torch.equal(product(native, dtype, slice(None)), found[:, 1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv", "d", "dv"), [(9, 3, 64, 64), (4, 4, 24, 40), (10, 2, 33, 16)]
)
def test_attend(native, dtype: torch.dtype, heads: int, kv: int, d: int, dv: int) -> None:
    q = random(3, 5, heads, d, dtype=dtype).transpose(1, 2)
    buffers = random(3, kv, 50, d, dtype=dtype, seed=1), random(3, kv, 50, dv, dtype=dtype, seed=2)
    k, v = (b[:, :, :45] for b in buffers)
    mask = torch.zeros(3, 1, 5, 45, dtype=dtype)
    for b, t in itertools.product(range(3), range(5)):
        mask[b, 0, t, 20 * b + t + 1 :] = float("-inf")
    mask[2, ..., :7], mask[1, ..., 5:9] = float("-inf"), float("-inf")
    wide = Operations().attend(q.double(), k.double(), v.double(), mask.double(), 0.2)
    found = native.attend(q, k, v, mask, 0.2)
    close(found, wide, Operations().attend(q, k, v, mask, 0.2))
    for b, t in itertools.product(range(3), range(5)):  # alone, and with keys that it can't see
        n = 20 * b + t + 1
        parts = q[b : b + 1, :, t : t + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        alone = native.attend(*parts, mask[b : b + 1, :, t : t + 1, :n], 0.2)
        assert torch.equal(alone[0, 0], found[b, t])
    v[1, 0, 3] = float("nan")
    broken = native.attend(q, k, v, mask, 0.2)
    assert broken[1].isnan().any()
    assert torch.equal(broken[0], found[0])
    assert torch.equal(broken[2], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rotary_and_write(native: Operations, dtype: torch.dtype) -> None:
    x, gain = random(5, 1, 70, dtype=dtype), random(70, dtype=dtype, seed=1)
    plain = Operations()
    close(
        native.rms_norm(x, gain, 1e-5),
        plain.rms_norm(x.double(), gain.double(), 1e-5),
        plain.rms_norm(x, gain, 1e-5),
    )
    q = random(5, 1, 3, 20, dtype=dtype).transpose(1, 2)
    cos, sin = random(5, 1, 1, 20, dtype=dtype, seed=1), random(5, 1, 1, 20, dtype=dtype, seed=2)
    close(
        native.rotary(q, cos, sin),
        plain.rotary(q.double(), cos.double(), sin.double()),
        plain.rotary(q, cos, sin),
    )
    buffers = [random(8, 3, 40, 20, dtype=dtype) for _ in range(2)]
    new = random(5, 4, 3, 20, dtype=dtype, seed=3).transpose(1, 2)
    slots, starts = torch.tensor([6, 0, 3, 1, 7]), torch.tensor([0, 5, 36, 11, 2])
    native.write(buffers[0], new, slots, starts)
    plain.write(buffers[1], new, slots, starts)
    assert torch.equal(*buffers)


def test_bfloat16_is_rounded_to_even_and_keeps_nan_and_infinity(native: Operations) -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -0.0, 3.3e38, 1e-40] * 8)
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    up = x.to(torch.bfloat16).view(1, 1, -1)
    at = torch.tensor([0])
    found = native.low_rank([SlotFactors(one, up, at + 1, 48)], at)(one)
    assert torch.equal(found.isnan(), up.isnan())
    assert torch.equal(found.nan_to_num(), up.nan_to_num())


def test_other_dtypes_and_layouts_are_computed_in_torch(native: Operations) -> None:
    x, gain = random(5, 1, 70, dtype=torch.float64), random(70, dtype=torch.float64)
    assert torch.equal(native.rms_norm(x, gain, 1e-5), Operations().rms_norm(x, gain, 1e-5))


def test_it_is_compiled_once_and_listed_in_the_cache(native: Operations) -> None:
    assert use(DECODING) == ""
    assert available("cpu").name == native.name == "cpu"
    assert any(entry.kind == "native" for entry in entries())


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CXX", "/nowhere/c++", "/nowhere/c"),  # no compiler
        ("CXX", "false", "exit code 1"),  # one that fails without a word
        ("LORAFOLD_CACHE", "/proc/none", "/proc/none"),  # a cache that can't be written
    ],
)
def test_where_it_cannot_be_compiled_it_says_why_and_torch_computes(
    monkeypatch: pytest.MonkeyPatch, native: Operations, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    _forms.cache_clear()
    use.cache_clear()
    try:
        assert says in use(DECODING)
        assert available("cpu").name == "plain"
    finally:
        _forms.cache_clear()
        use.cache_clear()


def test_a_new_form_is_a_class_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forms:
        """Takes vectors alone."""

        def doubled(self, x: torch.Tensor) -> Any:
            return x * 2 if x.dim() == 1 else NotImplemented

    of = Operation("doubled", lambda x: x + x + 0.5)
    monkeypatch.setitem(sys.modules, "lorafold.kernels.other", SimpleNamespace(Forms=Forms))
    monkeypatch.setitem(FORMS, of, {"cpu": "other.Forms"})
    one = torch.ones(1)
    assert of(one) == 2.5
    assert use((of,), "cuda") == "" == use((of,))
    assert of(one) == of.on("cpu")(one) == 2
    assert of(one[None]) == of.on("cuda")(one) == 2.5
    with plainly():
        assert of(one) == 2.5


def test_each_row_names_a_file_that_has_the_form(native: Operations) -> None:
    for of, row in FORMS.items():
        for place in row.values():
            assert callable(getattr(resolve_name(f"lorafold.kernels.{place}"), of.name))


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
