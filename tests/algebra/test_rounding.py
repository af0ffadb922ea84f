"""Rounding folded weights: each kind on its own terms, in both 16-bit dtypes."""

import math
from collections.abc import Callable

import pytest
import torch

from lorafold.core.rounding import generator_of, stochastic, turn_rounded
from lorafold.errors import LorafoldError
from lorafold.merging.rounding import CHUNK, RoundingStats, round_to
from rounding_cases import DTYPES, values

WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "stochastic": stochastic,
    **{f"turned {n}": lambda *of, n=n: turn_rounded(*of, n) for n in (0, 1, 100_000)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draw_is_one_of_the_two_neighbours_and_right_on_average(dtype, way):
    draws = 20_000
    for i, x in enumerate(values(dtype)):
        many = WAYS[way](x.expand(draws), dtype, generator_of(i, "x"))
        low, high = many.double().aminmax()
        assert low <= x <= high
        assert high in (low, torch.nextafter(low.to(dtype), torch.tensor(math.inf, dtype=dtype)))
        assert (torch.sign(many.double()) * torch.sign(x) >= 0).all()
        if x.to(dtype) == x:
            held = x.to(dtype).expand(draws)
            assert torch.equal(many.view(torch.int16), held.contiguous().view(torch.int16))
        # the mean of n draws of two values has a standard deviation of at most their distance /
        # (2 sqrt n); the rest is fp64's
        error = (many.double().mean() - x).abs()
        assert error <= 5 * (high - low) / (2 * draws**0.5) + 1e-12 * abs(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_a_weak_update_that_nearest_loses(dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(512, 512, generator=generator).to(dtype)
    dw = torch.randn(512, 512, generator=generator) * torch.finfo(dtype).eps / 20
    kept = {
        how: round_to(w.float() + dw, w, how, generator_of(0, "w"))
        for how in ("nearest", "stochastic", "auto")
    }
    assert kept["nearest"].stats.survival < 0.5
    assert kept["auto"].mode == "stochastic"
    assert torch.equal(kept["auto"].tensor, kept["stochastic"].tensor)
    # the projection of the rounding noise on dW has the standard deviation noise / sqrt(elements)
    assert abs(kept["auto"].stats.survival - 1) < 5 * kept["auto"].stats.noise / 512


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_nearest_where_the_update_survives_it(dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 256, generator=generator).to(dtype)
    target = w.float() + torch.randn(256, 256, generator=generator) * 0.1
    result = round_to(target, w, "auto", generator_of(0, "w"))
    assert result.mode == "nearest"
    assert torch.equal(result.tensor, target.to(dtype))
    assert result.stats.survival > 0.98
    assert result.stats.noise < round_to(target, w, "stochastic", generator_of(0, "w")).stats.noise


def test_fp32_is_exact_whatever_was_asked():
    w, target = torch.zeros(8, 8), torch.randn(8, 8)
    for how in ("auto", "nearest", "stochastic"):
        result = round_to(target, w, how, generator_of(0, "w"))
        assert torch.equal(result.tensor, target)
        assert (result.mode, result.stats.survival, result.stats.noise) == ("exact", 1.0, 0.0)


def test_sums_are_those_of_the_whole_tensor_over_many_chunks():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, CHUNK // 2 + 7, generator=generator).bfloat16()
    # not contiguous, as a transposed storage is
    target = (w.float() + 1e-3 * torch.randn(w.shape, generator=generator)).t()
    result = round_to(target, w.t(), "nearest", generator_of(0, "w"))
    rounded, t, w = result.tensor.double(), target.double(), w.t().double()
    expected = RoundingStats(
        ((rounded - w) * (t - w)).sum().item(),
        (t - w).square().sum().item(),
        (rounded - t).square().sum().item(),
    )
    # sums of fp32 products, pairwise: some units of fp32
    for name in ("surviving", "update", "error"):
        assert getattr(result.stats, name) == pytest.approx(getattr(expected, name), rel=1e-5)


def test_a_seed_and_a_name_give_a_stream():
    w, target = torch.zeros(64, 64, dtype=torch.bfloat16), torch.rand(64, 64)
    draw = lambda seed, name: round_to(target, w, "stochastic", generator_of(seed, name)).tensor  # noqa: E731
    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))


def test_no_change_survives_whole():
    w = torch.randn(4, 4).bfloat16()
    result = round_to(w.float(), w, "auto", generator_of(0, "w"))
    assert torch.equal(result.tensor, w)
    assert (result.stats.survival, result.stats.noise) == (1.0, 0.0)


@pytest.mark.parametrize("how", ["auto", "nearest", "stochastic"])
@pytest.mark.parametrize("bad", [7e4, math.inf, math.nan])
def test_values_that_do_not_fit_are_refused(how, bad):
    w = torch.ones(4, 4, dtype=torch.float16)
    target = w.float()
    target[2, 1] = bad
    with pytest.raises(LorafoldError, match="float16"):
        round_to(target, w, how, generator_of(0, "w"))
