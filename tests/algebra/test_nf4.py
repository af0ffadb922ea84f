"""The reference of NF4 is what bitsandbytes stores, byte for byte."""

from itertools import product

import pytest
import torch

import nf4_reference as nf4
from lorafold.layers import bitsandbytes as quantized
from lorafold.layers.bitsandbytes import CHUNK, import_bitsandbytes, quantize_nf4
from lorafold.ops.nf4 import OFFSET

bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outlier() -> torch.Tensor:
    w = normal(4, 64)
    w[1, 5], w[2, 0] = 1e4, -30.0
    return w


def around_ties() -> torch.Tensor:
    """Whole blocks of c times every midpoint of two levels, and the floats beside them."""
    level = nf4.levels()
    # where c is no power of two, w * (1 / c) and w / c fall on different sides
    c = torch.cat([torch.ones(1), normal(99).abs()])[:, None]
    ties = c * (level[:-1] + level[1:]) / 2
    below, above = ties.nextafter(torch.tensor(-9.0)), ties.nextafter(torch.tensor(9.0))
    return torch.cat([c, ties, below, above, c * level, torch.full_like(c, -0.0).expand(-1, 2)], 1)


CASES = {
    "normal": normal(96, 192),
    "zeros": torch.zeros(4, 64),
    "zeros among others": torch.cat([normal(64), torch.zeros(64), normal(64)]),
    "constants": torch.tensor([0.3, -0.7, 1.0, -1.0]).repeat_interleave(64),
    "outlier": with_outlier(),
    "ties": around_ties(),
    "many magnitudes": normal(8, 64) * torch.logspace(-20, 20, 8)[:, None],
    "one": normal(1),
    "odd and less than a block": normal(63),
    "a block and one": normal(65),
    "ragged": normal(64 * 5 + 7),
    "odd rows": normal(5, 13),
    "many blocks of constants, ragged": normal(64 * 600 + 30),
}


def to(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return w.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def of_bitsandbytes(w: torch.Tensor, double: bool) -> tuple[nf4.NF4Tensor, torch.Tensor]:
    """What bitsandbytes 0.50 stores for w as one row: for others it takes wrong constants."""
    how = {"blocksize": 64, "compress_statistics": double, "quant_type": "nf4"}
    bytes_, state = bnb.quantize_4bit(w.flatten(), **how)
    constants = state.absmax
    if double:
        constants = nf4.BlockConstants(state.absmax, state.state2.absmax, state.offset)
    dense = bnb.dequantize_4bit(bytes_, state).view(w.shape)
    return nf4.NF4Tensor(bytes_.flatten(), constants, w.shape, 64), dense


def on_grid(y: torch.Tensor) -> torch.Tensor:
    """y on the 65536 points by which the CPU kernel looks up an 8-bit code."""
    return -1 + 2 * ((y.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).int() / 65535


def test_levels_are_those_of_bitsandbytes():
    assert torch.equal(nf4.levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


def assert_bytes(w: torch.Tensor, dtype: torch.dtype) -> None:
    ours, (theirs, dense) = nf4.quantize(w, double=False), of_bitsandbytes(w, False)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.constants, theirs.constants)
    assert torch.equal(nf4.dequantize(ours, dtype), dense)


@pytest.mark.few(14)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bytes_and_values_are_those_of_bitsandbytes(case, dtype):
    assert_bytes(to(CASES[case], dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_double_quantized_bytes_and_values_are_those_of_bitsandbytes(case, dtype):
    w = to(CASES[case], dtype)
    ours, (theirs, dense) = nf4.quantize(w), of_bitsandbytes(w, True)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.constants.mean, theirs.constants.mean)
    assert torch.equal(ours.constants.absmax, theirs.constants.absmax)
    assert torch.equal(nf4.dequantize(theirs, dtype), dense)  # from the same bytes the same values

    c = nf4.quantize(w, double=False).constants
    y, d = nf4.normalized(c - c.mean(), 256)
    if d.any():  # else any code stands for zero: theirs is 0, ours 127
        nearest = nf4.nearest(on_grid(y), nf4.dynamic_map()).flatten()[: len(c)]
        assert torch.equal(theirs.constants.codes, nearest)
    # the code nearest to the grid's point is at worst one step of the grid farther away
    worse = (theirs.constants.dense() - c).abs() - (ours.constants.dense() - c).abs()
    assert (worse <= d.repeat_interleave(256)[: len(c)] * 2 / 65535 + 4 * EPS * c.abs().max()).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.17.mlp.down_proj.weight"]
)
def test_real_weights_are_stored_as_bitsandbytes_does(smollm2, name):
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        w = file.get_tensor(name).bfloat16()
    assert_bytes(w, torch.bfloat16)
    ours, (theirs, dense) = nf4.quantize(w), of_bitsandbytes(w, True)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(nf4.dequantize(theirs, torch.bfloat16), dense)
    # near a tie, by the grid's rounding
    assert (ours.constants.codes != theirs.constants.codes).float().mean() < 0.01


def test_levels_are_quantiles_at_even_steps_on_either_side_of_an_exact_zero():
    level = nf4.levels()
    assert level[[0, 7, 15]].tolist() == [-1, 0, 1]
    assert abs(OFFSET - (1 - (1 / 32 + 1 / 30) / 2)) < 5e-8  # the digits that it has
    widest = torch.special.ndtri(torch.tensor(OFFSET, dtype=torch.float64))
    steps = torch.special.ndtr(level.double() * widest).diff()
    for side, n in ((steps[:7], 7), (steps[7:], 8)):
        torch.testing.assert_close(
            side, torch.full_like(side, (OFFSET - 0.5) / n), rtol=0, atol=4 * EPS
        )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_half_the_widest_gap(case, double):
    w = CASES[case]
    half_gap = nf4.levels().diff().max() / 2  # 0.152, between the two lowest levels
    c = nf4.normalized(w, 64)[1]
    bound = half_gap * c
    # the constants are off by half a step of the coarsest part of the map, and so is the lowest, -1
    # by 0.993
    if double:
        d = nf4.normalized(c - c.mean(), 256)[1]
        bound = bound + nf4.dynamic_map().diff().max() / 2 * d.repeat_interleave(256)[: len(c)]
    error = (nf4.dequantize(nf4.quantize(w, double=double), torch.float32) - w).abs()
    magnitude = c.abs().max() if double else c
    assert (nf4.normalized(error, 64)[1] <= bound + 4 * EPS * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_was_dequantized_quantizes_to_the_same_bytes(case, dtype):
    once = nf4.quantize(CASES[case].to(dtype), double=False)
    twice = nf4.quantize(nf4.dequantize(once, dtype), double=False)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.constants, twice.constants)


def test_a_block_of_zeros_stays_zero_under_an_inexact_constant():
    packed = nf4.quantize(CASES["zeros among others"])
    assert not nf4.dequantize(packed, torch.float32)[64:128].any()


@pytest.mark.parametrize("block", [32, 64, 128])
def test_bits_per_weight_are_those_that_are_stored(block):
    w = normal(64, 64 * 32)
    stored = lambda *tensors: 8 * sum(t.nbytes for t in tensors) / w.numel()  # noqa: E731
    plain, packed = nf4.quantize(w, block, double=False), nf4.quantize(w, block)
    constants = packed.constants
    assert stored(plain.codes, plain.constants) == nf4.bits_per_weight(block, double=False)
    found = stored(packed.codes, constants.codes, constants.absmax)
    assert found == nf4.bits_per_weight(block)
    assert nf4.bits_per_weight() == 4 + 8 / 64 + 32 / (64 * 256)
    assert (round(nf4.bits_per_weight(), 3), nf4.bits_per_weight(double=False)) == (4.127, 4.5)


def own_kernel(w: torch.Tensor, *how: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and constants by the kernel of bitsandbytes that every device can run."""
    anywhere = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return torch.ops.bitsandbytes.quantize_4bit.default.redispatch(anywhere, w, *how)


def not_finite() -> torch.Tensor:
    w = normal(4, 64)
    w[0, 3], w[1, 5], w[2, 7] = torch.nan, torch.inf, -torch.inf
    return w


WHOLE = {name: w for name, w in CASES.items() if w.numel() % 64 == 0}
WHOLE |= {"several parts": normal(2 * CHUNK // 64 + 3, 64), "not finite": not_finite()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w", WHOLE.values(), ids=WHOLE)
def test_the_faster_codes_are_the_bytes_of_bitsandbytes(w, dtype):
    w = to(w, dtype)
    for block in (64, 32):
        made, expected = quantize_nf4(w, block), own_kernel(w, block, "nf4", torch.uint8)
        assert torch.equal(made[0], expected[0])
        torch.testing.assert_close(made[1], expected[1], rtol=0, atol=0, equal_nan=True)


def test_bitsandbytes_quantizes_with_the_faster_codes_what_they_know(monkeypatch):
    blocks = []

    def counted(w, block):
        blocks.append(block)
        return quantize_nf4(w, block)

    monkeypatch.setattr(quantized, "quantize_nf4", counted)
    import_bitsandbytes()
    operation = torch.ops.bitsandbytes.quantize_4bit.default
    for w in (normal(8, 64), normal(5, 40)):
        for kind, stored_as in product(("nf4", "fp4"), (torch.uint8, torch.bfloat16)):
            made = operation(w, 64, kind, stored_as)
            for ours, theirs in zip(made, own_kernel(w, 64, kind, stored_as), strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert blocks == [64]  # of all these calls the faster codes know one
