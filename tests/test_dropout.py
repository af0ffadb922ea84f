"""Dropout masks: exact probability, the caller's random state, a preserved mean."""

import math

import pytest
import torch

from lorafold.ops.dropout import dropout, keep_mask, keep_scale

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 9), (64, 0)])
def test_mask_is_0_or_1_like_its_input(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mask = keep_mask(torch.empty(shape, dtype=dtype), 0.5)
    assert mask.shape == shape
    assert mask.dtype == dtype
    assert ((mask == 0) | (mask == 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.001, 0.05, 0.5, 0.9])
def test_share_kept_is_binomial(p: float, dtype: torch.dtype) -> None:
    n = 1 << 20
    exact = round(p * 65536) / 65536
    kept = keep_mask(torch.empty(n, dtype=dtype), p, torch.Generator().manual_seed(1)).double().sum().item()
    assert abs(kept - n * (1 - exact)) <= 5 * math.sqrt(n * exact * (1 - exact))  # five sigma: once in 1.7 million seeds


def test_elements_are_independent() -> None:
    p, n = 0.3, 1 << 18
    keep = keep_mask(torch.empty(n), p, torch.Generator().manual_seed(2)).double() - (1 - p)
    for lag in (1, 2, 3, 4, 5, 8, 64):  # four elements share one 64-bit draw
        correlation = (keep[lag:] * keep[:-lag]).mean().item() / (p * (1 - p))
        assert abs(correlation) <= 5 / math.sqrt(n)


def test_follows_the_default_generator() -> None:
    x = torch.empty(1000, dtype=torch.bfloat16)
    torch.manual_seed(3)
    first, second = keep_mask(x, 0.5), keep_mask(x, 0.5)
    torch.manual_seed(3)
    again = keep_mask(x, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_own_generator_leaves_the_default_alone() -> None:
    before = torch.get_rng_state()
    masks = [keep_mask(torch.empty(1000), 0.5, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*masks)
    assert torch.equal(torch.get_rng_state(), before)


def test_mean_is_preserved() -> None:
    torch.manual_seed(5)
    p, n = 0.05, 1 << 20
    x = torch.ones(n)
    assert keep_scale(p) == pytest.approx(1 / (1 - p), rel=1 / 65536)
    dropped, _ = dropout(x, p)
    sigma = math.sqrt(p / (1 - p) / n)
    assert abs(dropped.double().mean().item() - 1) <= 5 * sigma


def test_gradient_is_the_mask_and_the_input_is_not_kept() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropped, mask = dropout(x, 0.25)
    dropped.sum().backward()
    assert torch.equal(x.grad, mask * keep_scale(0.25))
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [mask.data_ptr()]


def test_checkpoint_replays_the_mask() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return dropout(x, 0.5)[0].square().sum()

    def gradient(checkpointed: bool) -> torch.Tensor:
        x = torch.linspace(-1, 1, 512).requires_grad_()
        torch.manual_seed(6)
        y = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False) if checkpointed else loss(x)
        torch.rand(3)  # whatever else is drawn before the backward
        return torch.autograd.grad(y, x)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="expected 0 or more and below 1"):
        keep_mask(torch.empty(3), p)
