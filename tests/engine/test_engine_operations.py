"""The engine's operations in C++, against torch in fp64, and alone against in company."""

import shutil
import sys
from collections.abc import Callable
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.engine.operations import (
    NUM_ROWS,
    BlockMatmuls,
    Operations,
    min_invariant_rows,
    min_matmul_rows,
    operations_on,
    random_rows,
)
from lorafold.files.cache import entries
from lorafold.kernels.registry import DECODING, IMPLEMENTATIONS, _load, enable
from lorafold.ops.arithmetic import FEW, override_widening
from lorafold.ops.decoding import STORED, SlotFactors
from lorafold.ops.elementwise import ACTIVATIONS
from lorafold.ops.operators import Operation, plain_implementations

T = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def native() -> Operations:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    if why := enable(DECODING):
        pytest.skip(why)
    return Operations("cpu")


def close(found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """At most twice as far from the values in fp64 as torch's result is, or a rounding."""
    assert found.dtype == plain.dtype
    assert found.shape == expected.shape
    wide = expected.double()
    rounding = torch.finfo(found.dtype).eps * wide.norm()
    assert (found.double() - wide).norm() <= max(2 * (plain.double() - wide).norm(), rounding)


# rows and tokens, and sizes at which blocks and vectors have ends: of inputs and outputs, the rank,
# the heads of queries and of keys
B, TOKENS = 5, 6
SIZES = [(44, 37, 3, 6, 2), (64, 96, 16, 9, 3), (34, 51, 1, 4, 4)]
WHOLE = slice(None), slice(None)
Compute = Callable[[slice, slice], T]


def random_of(*shape: int, dtype: torch.dtype, seed: int = 0) -> T:
    """Numbers that 16 bits hold."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.bfloat16().to(dtype)


def low_rank(of: Operations, dtype: torch.dtype, size: tuple[int, ...]) -> Compute:
    n, width, rank, *_ = size
    ranks, slots = torch.tensor([rank, 1, rank, 0, rank]), torch.tensor([2, 0, 3, 4, 1])
    down, up = (random_of(5, rank, k, dtype=dtype, seed=k) for k in (n, width))
    for slot, r in enumerate(ranks.tolist()):
        down[slot, r:], up[slot, r:] = 0, 0
    other = (random_of(5, 2, k, dtype=dtype, seed=k) for k in (n, 33))
    parts = [
        SlotFactors(down, up, ranks, width),
        SlotFactors(None, None, torch.zeros(5, dtype=torch.long), 7),
        SlotFactors(*other, torch.full((5,), 2), 33),
    ]
    x = random_of(B, TOKENS, n, dtype=dtype, seed=2)
    return lambda rows, tokens: of.low_rank(parts, slots[rows])(x[rows, tokens])


def attention(dtype: torch.dtype, size: tuple[int, ...]) -> tuple[T, T, T, T]:
    n, width, _, heads, kv = size
    q = random_of(B, TOKENS, heads, n, dtype=dtype).transpose(1, 2)
    k, v = (random_of(B, kv, 50, d, dtype=dtype, seed=d)[:, :, :40] for d in (n, width))
    last = torch.arange(TOKENS)[:, None] + torch.tensor([0, 9, 3, 30, 33])[:, None, None]
    mask = torch.zeros(B, 1, TOKENS, 40, dtype=dtype)
    mask.masked_fill_(torch.arange(40) > last[:, None], float("-inf"))
    mask[3, ..., :7], mask[4, ..., 5:9] = float("-inf"), float("-inf")
    return q, k, v, mask


def attend(of: Operations, dtype: torch.dtype, size: tuple[int, ...]) -> Compute:
    q, k, v, mask = attention(dtype, size)
    return lambda rows, tokens: of.attend(
        q[rows, :, tokens], k[rows], v[rows], mask[rows, :, tokens], 0.2
    )


def rms_norm(of: Operations, dtype: torch.dtype, size: tuple[int, ...]) -> Compute:
    x, gain = random_of(B, TOKENS, size[0], dtype=dtype), random_of(size[0], dtype=dtype, seed=1)
    return lambda rows, tokens: of.rms_norm(x[rows, tokens], gain, 1e-5)


def rotary(of: Operations, dtype: torch.dtype, size: tuple[int, ...]) -> Compute:
    x = random_of(B, TOKENS, 3, size[0], dtype=dtype).transpose(1, 2)
    cos, sin = (random_of(B, 1, TOKENS, size[0], dtype=dtype, seed=s) for s in (1, 2))
    return lambda rows, tokens: of.rotary(
        x[rows, :, tokens], cos[rows, :, tokens], sin[rows, :, tokens]
    ).transpose(1, 2)


def gated(of: Operations, dtype: torch.dtype, size: tuple[int, ...]) -> Compute:
    both = random_of(B, TOKENS, 2 * size[0], dtype=dtype)  # as one product with both matrices
    known = [act for act in ACTIVATIONS if act != "gelu"]  # torch computes that one

    def run(rows: slice, tokens: slice) -> T:
        gate, up = both[rows, tokens].chunk(2, -1)
        return torch.cat([of.gated(gate, up, act) for act in known], -1)

    return run


def scale(of: Operations, dtype: torch.dtype, size: tuple[int, ...]) -> Compute:
    y = random_of(B, TOKENS, size[0], dtype=dtype)
    g, c = (random_of(B, size[0], dtype=torch.float32, seed=s) for s in (1, 2))
    return lambda rows, tokens: torch.cat(
        [of.scale(y[rows, tokens], g[rows], c[rows]), of.scale(y[rows, tokens], g[0], None)], -1
    )


CHECKS: dict[str, Any] = {
    f.__name__: f for f in (low_rank, attend, rms_norm, rotary, gated, scale)
}


INDEPENDENT = ("rotary", "scale")  # also in plain torch


def test_every_operation_is_checked() -> None:
    operations = {of.name for of in DECODING if of is not STORED}  # which computes nothing
    assert CHECKS.keys() == operations


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("gated", "scale")])
def test_values_are_those_of_torch(name: str, dtype: torch.dtype, size, native) -> None:
    found, plain = (CHECKS[name](of, dtype, size)(*WHOLE) for of in (native, Operations()))
    close(found, CHECKS[name](Operations(), torch.float64, size)(*WHOLE), plain)
    if name == "low_rank":  # of rank 0, and of nothing
        assert not found[2, :, : size[1]].any()
        assert not found[..., size[1] : size[1] + 7].any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "native"])
@pytest.mark.parametrize("name", CHECKS)
def test_rows_are_independent(name, kind, dtype, size, request) -> None:
    if kind == "plain" and name not in INDEPENDENT:
        pytest.skip("torch has other orders of summation for other shapes")
    of = Operations() if kind == "plain" else request.getfixturevalue("native")
    compute = CHECKS[name](of, dtype, size)
    whole = compute(*WHOLE)
    for b in range(B):
        assert torch.equal(compute(slice(b, b + 1), slice(None))[0], whole[b])
    for t in range(TOKENS):
        assert torch.equal(compute(slice(None), slice(t, t + 1))[:, 0], whole[:, t])
    for b, t in ((0, 0), (3, 4)):  # a pass of several tokens, and one of a single one
        assert torch.equal(compute(slice(b, B), slice(t, TOKENS))[0, 0], whole[b, t])
        assert torch.equal(compute(slice(b, b + 1), slice(t, t + 1))[0, 0], whole[b, t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_attention_reads_what_a_token_sees_alone(native, size, dtype: torch.dtype) -> None:
    q, k, v, mask = attention(dtype, size)
    found = native.attend(q, k, v, mask, 0.2)
    for b, start in enumerate((0, 9, 3, 30, 33)):
        for t in range(TOKENS):
            own, n = slice(b, b + 1), start + t + 1
            parts = q[own, :, t : t + 1], k[own, :, :n], v[own, :, :n], mask[own, :, t : t + 1, :n]
            assert torch.equal(native.attend(*parts, 0.2)[0, 0], found[b, t])
    v[1, 0, 3] = float("nan")
    broken = native.attend(q, k, v, mask, 0.2)
    assert broken[1].isnan().any()
    others = [0, 2, 3, 4]
    assert torch.equal(broken[others], found[others])


def test_bfloat16_is_rounded_to_even_and_keeps_nan_and_infinity(native: Operations) -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -0.0, 3.3e38, 1e-40] * 8)
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    up = x.to(torch.bfloat16).view(1, 1, -1)
    at = torch.tensor([0])
    found = native.low_rank([SlotFactors(one, up, at + 1, 48)], at)(one)
    assert torch.equal(found.isnan(), up.isnan())
    assert torch.equal(found.nan_to_num(), up.nan_to_num())


def test_other_dtypes_and_layouts_are_computed_in_torch(native: Operations) -> None:
    x, gain = random_of(5, 1, 70, dtype=torch.float64), random_of(70, dtype=torch.float64)
    assert torch.equal(native.rms_norm(x, gain, 1e-5), Operations().rms_norm(x, gain, 1e-5))


def test_it_is_compiled_once_and_listed_in_the_cache(native: Operations) -> None:
    assert enable(DECODING) == ""
    assert operations_on("cpu").name == native.name == "cpu"
    assert any(entry.kind == "native" for entry in entries())


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CXX", "/nowhere/c++", "/nowhere/c"),  # no compiler
        ("CXX", "false", "exit code 1"),  # one that fails without a word
        ("LORAFOLD_CACHE", "/proc/none", "/proc/none"),  # a cache that can't be written
    ],
)
def test_where_nothing_compiles_torch_computes(monkeypatch, native, variable, value, says) -> None:
    monkeypatch.setenv(variable, value)
    _load.cache_clear()
    enable.cache_clear()
    try:
        assert says in enable(DECODING)
        assert operations_on("cpu").name == "plain"
    finally:
        _load.cache_clear()
        enable.cache_clear()


def test_a_new_form_is_a_class_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forms:
        """Takes vectors alone."""

        def doubled(self, x: torch.Tensor) -> Any:
            return x * 2 if x.dim() == 1 else NotImplemented

    of = Operation("doubled", lambda x: x + x + 0.5)
    monkeypatch.setitem(sys.modules, "lorafold.kernels.other", SimpleNamespace(Forms=Forms))
    monkeypatch.setitem(IMPLEMENTATIONS, of, {"cpu": "other.Forms"})
    one = torch.ones(1)
    assert of(one) == 2.5
    assert enable((of,), "cuda") == "" == enable((of,))
    assert of(one) == of.on("cpu")(one) == 2
    assert of(one[None]) == of.on("cuda")(one) == 2.5
    with plain_implementations():
        assert of(one) == 2.5


def test_each_row_names_a_file_that_has_the_form(native: Operations) -> None:
    for of, row in IMPLEMENTATIONS.items():
        for place in row.values():
            assert callable(getattr(resolve_name(f"lorafold.kernels.{place}"), of.name))


@pytest.mark.parametrize("odd", [*range(1, FEW + 1)])
def test_one_number_of_rows_that_is_summed_otherwise_is_found(odd: int) -> None:
    def kernel(x: Tensor) -> Tensor:
        a, b, c = x.unbind(-1)
        return a + (b + c) if len(x) == odd else (a + b) + c

    assert min_invariant_rows(kernel, random_rows(3, torch.float32)) == odd + 1


def test_a_kernel_that_never_settles_has_the_last_number() -> None:
    assert min_invariant_rows(lambda x: x / len(x), random_rows(64, torch.float32)) == NUM_ROWS[-1]


@pytest.mark.parametrize("widened", [False, True])
def test_products_of_this_processor_keep_their_bits_from_there_on(widened: bool) -> None:
    shapes = [(96, 576), (576, 96)]
    with override_widening(widened=widened, rows=1):
        least = min_matmul_rows(shapes, torch.bfloat16)
    assert 1 <= least <= NUM_ROWS[-1]
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
def test_in_blocks_no_product_depends_on_the_number_of_rows(dtype, inference) -> None:
    m = random_rows(1536, dtype)[:96]
    many = random_rows(1536, dtype)
    b, onto = many[0, :96], many[:, :96]

    def products(x: Tensor, onto: Tensor) -> list[Tensor]:
        inplace = onto.clone().addmm_(x, m.t())
        batched = F.linear(x.view(1, len(x), -1), m)[0]
        return [x @ m.t(), F.linear(x, m, b), torch.addmm(onto, x, m.t()), inplace, batched]

    with torch.inference_mode(inference), BlockMatmuls(FEW):
        whole = products(many, onto)
        for n in (1, 2, 7, 16, 17, 33, 128, 200):
            for start in (0, len(many) - n):
                rows = slice(start, start + n)
                for own, of_all in zip(products(many[rows], onto[rows]), whole, strict=True):
                    assert torch.equal(own, of_all[rows]), (n, start)
    expected = products(many, onto)
    for own, of_torch in zip(whole, expected, strict=True):
        torch.testing.assert_close(own, of_torch, rtol=2e-2, atol=2e-2 * float(of_torch.std()))
