"""The fused operations of training against `ops/reference.py`: values, gradients, bf16."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import reference_ops as reference
from lorafold.ops.dropout import Dropped, drop_elements, zero_dropped
from lorafold.ops.elementwise import ACTIVATIONS, gated, rms_norm, rotary
from lorafold.ops.frozen import low_rank_linear

WIDE = {torch.float32: 1e-5, torch.float64: 1e-12}
HALF = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("each_form")
Op = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(op: Op, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of op at the tensors in a dtype, their layouts kept, in fp64."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = op(*leaves)
    assert out.dtype is dtype
    g = normal(*out.shape, seed=9).to(dtype)
    return [t.double() for t in (out, *torch.autograd.grad(out, leaves, g))]


def assert_equal(fast: Op, spec: Op, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    for found, expected in zip(run(fast, tensors, dtype), run(spec, tensors, dtype), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= WIDE[dtype] * expected.norm()


def assert_no_worse(fast: Op, spec: Op, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """As near to fp64 as the specification in 16 bits is, give or take 5%."""
    tensors = [t.to(dtype).double() for t in tensors]
    truth = run(spec, tensors, torch.float64)
    for found, peer, true in zip(
        run(fast, tensors, dtype), run(spec, tensors, dtype), truth, strict=True
    ):
        assert (found - true).norm() <= 1.05 * (peer - true).norm()


NORM_SHAPES = {"rows": (6, 32), "tokens": (2, 5, 32), "heads": (2, 3, 4, 32), "none": (0, 32)}
GAIN = 1 + 0.3 * normal(32, seed=1)


def norm_input(shape: str) -> Tensor:
    """Rows of all sizes: in the smallest, eps counts."""
    x = normal(*NORM_SHAPES[shape])
    return x * torch.logspace(-3, 2, len(x), dtype=torch.float64).view(-1, *[1] * (x.dim() - 1))


def norms(gain: Tensor) -> tuple[Op, Op]:
    """The fast one and the specification."""
    return lambda x: rms_norm(x, gain, 1e-5), lambda x: reference.rms_norm(x, gain, 1e-5)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm_equals_its_specification(shape: str, dtype: torch.dtype) -> None:
    assert_equal(*norms(GAIN.to(dtype)), [norm_input(shape)], dtype)


def test_norm_of_a_transposed_input() -> None:
    fast, spec = norms(GAIN)
    x = normal(2, 4, 5, 32).transpose(1, 2)
    assert_equal(fast, spec, [x], torch.float64)
    assert torch.autograd.gradcheck(fast, x[:1, :2, :2].requires_grad_())


@pytest.mark.parametrize("gain_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", HALF)
def test_norm_in_16_bits(dtype: torch.dtype, gain_dtype: str) -> None:
    """Against the form of models, which rounds before the gain too, and the specification."""
    gain = GAIN.to(dtype)
    given = gain if gain_dtype == "same" else gain.float()
    x = normal(64, 16, 32)

    def spec(x: Tensor) -> Tensor:
        return reference.rms_norm(x, given.to(torch.promote_types(x.dtype, given.dtype)), 1e-5)

    def llama(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return gain.to(x.dtype) * (
            wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        ).to(x.dtype)

    fast, _ = norms(given)
    assert_no_worse(fast, spec, [x], dtype)
    assert_no_worse(fast, llama, [x], dtype)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
def test_norm_takes_a_narrower_gain(x_dtype: torch.dtype) -> None:
    """A model in 16 bits whose residual stream is wider loses nothing of it."""
    assert_equal(*norms(GAIN.bfloat16()), [normal(8, 32)], x_dtype)


# x, and the dimension in which cos and sin (B, T, D) lack the heads
LAYOUTS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "heads-first": (lambda: normal(2, 3, 7, 8), 1),
    "transposed": (lambda: normal(2, 7, 3, 8).transpose(1, 2), 1),
    "tokens-first": (lambda: normal(2, 7, 3, 8), 2),
    "a-slice": (lambda: normal(2, 3, 7, 20)[..., 4:12], 1),
    "one-head": (lambda: normal(2, 1, 7, 8).expand(2, 3, 7, 8), 1),
}


def angles(rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of random positions, in the shape that broadcasts over heads."""
    theta = normal(rows, 7, 4, seed=3).repeat(1, 1, 2)
    return theta.cos().to(dtype).unsqueeze(dim), theta.sin().to(dtype).unsqueeze(dim)


def rotaries(cos: Tensor, sin: Tensor) -> tuple[Op, Op]:
    def with_(op: Op) -> Op:
        return lambda x: op(x, cos.to(x.dtype), sin.to(x.dtype))

    return with_(rotary), with_(reference.rotary)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_equals_its_specification(layout: str, dtype: torch.dtype, rows: int) -> None:
    make, dim = LAYOUTS[layout]
    assert_equal(*rotaries(*angles(rows, dim, dtype)), [make()], dtype)


@pytest.mark.few(5)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_differentiates_and_keeps_the_layout(layout: str) -> None:
    make, dim = LAYOUTS[layout]
    cos, sin = angles(1, dim, torch.float64)
    x = make()
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x.clone().requires_grad_())
    if layout in ("heads-first", "transposed", "tokens-first"):
        assert rotary(x, cos, sin).stride() == x.stride()


def test_rotary_takes_any_cos_and_sin() -> None:
    """Halves of cos and of sin that differ: the two pairs of a plane each have their own."""
    x, cos, sin = normal(2, 3, 7, 8), normal(7, 8, seed=4), normal(7, 8, seed=5)
    assert_equal(*rotaries(cos, sin), [x], torch.float64)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["heads-first", "transposed"])
def test_rotary_in_16_bits(layout: str, dtype: torch.dtype) -> None:
    x = normal(16, 12, 7, 8) if layout == "heads-first" else normal(16, 7, 12, 8).transpose(1, 2)
    cos, sin = (t.to(dtype) for t in angles(1, 1, torch.float64))
    assert_no_worse(*rotaries(cos, sin), [x], dtype)


def gates(act: str) -> tuple[Op, Op]:
    forward = ACTIVATIONS[act].forward
    return lambda g, u: gated(g, u, act), lambda g, u: reference.gated(g, u, forward)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_equals_its_specification(act: str, dtype: torch.dtype) -> None:
    assert_equal(*gates(act), [3 * normal(2, 5, 12), normal(2, 5, 12, seed=1)], dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_differentiates_from_halves_of_one_tensor(act: str) -> None:
    both = normal(3, 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gated(*t.chunk(2, -1), act), both)
    gate, up = both.detach().chunk(2, -1)
    assert torch.autograd.gradcheck(lambda u: gated(gate, u, act), up.clone().requires_grad_())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_in_16_bits(act: str, dtype: torch.dtype) -> None:
    assert_no_worse(*gates(act), [2 * normal(64, 128), normal(64, 128, seed=1)], dtype)


OUT, IN, RANK, P = 24, 16, 3, 0.3
W = normal(OUT, IN, seed=6) / IN**0.5


def factors() -> list[Tensor]:
    return [normal(RANK, IN, seed=7), 0.2 * normal(OUT, RANK, seed=8)]


def places(shape: Sequence[int], form: str) -> Tensor | None:
    """What is dropped, as `dropped` gives it on a CPU or elsewhere."""
    if form == "none":
        return None
    torch.manual_seed(1)
    where = drop_elements(torch.empty(*shape), P)[1]
    return zero_dropped(torch.ones(*shape), where) == 0 if form == "mask" else where


def fast_and_spec(where: Tensor | None, w_dtype: torch.dtype | None = None) -> tuple[Op, Op]:
    """Both with k = 1 / (1 - P) where elements are dropped, and W as it is in w_dtype."""
    k = 1.0 if where is None else 1 / (1 - P)
    w = W if w_dtype is None else W.to(w_dtype)

    def fast(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        drop = None
        if where is not None:
            drop = Dropped(zero_dropped(x.detach(), where), where, k, 0, None, set())
        return low_rank_linear(x, lambda dtype: w.to(dtype), down, up, drop, 1.0)

    def spec(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        keep = None if where is None else zero_dropped(torch.ones(x.shape, dtype=x.dtype), where)
        return reference.low_rank_linear(x, w.to(x.dtype), down, up, keep, k)

    return fast, spec


@pytest.mark.parametrize("form", ["none", "places", "mask"])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", [(7, IN), (2, 5, IN), (2, 3, 4, IN), (0, IN)], ids=str)
def test_low_rank_equals_its_specification(shape, dtype, form) -> None:
    assert_equal(*fast_and_spec(places(shape, form)), [normal(*shape), *factors()], dtype)


@pytest.mark.few(4)
@pytest.mark.parametrize("form", ["none", "places", "mask"])
def test_low_rank_differentiates_from_a_transposed_input(form: str) -> None:
    x = normal(3, 2, IN).transpose(0, 1)
    fast, spec = fast_and_spec(places(x.shape, form))
    assert_equal(fast, spec, [x, *factors()], torch.float64)
    assert torch.autograd.gradcheck(fast, [t.clone().requires_grad_() for t in (x, *factors())])


@pytest.mark.parametrize("trained", ["x", "down", "up", "factors", "nothing"])
def test_low_rank_differentiates_what_is_trained(trained: str) -> None:
    names = {"factors": ["down", "up"], "nothing": []}.get(trained, [trained])
    given = dict(zip(("x", "down", "up"), [normal(2, 5, IN), *factors()], strict=True))
    outs: list[dict[str, Any]] = []
    for op in fast_and_spec(places((2, 5, IN), "places")):
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in given.items()}
        y = op(**leaves)
        assert y.requires_grad is bool(names)
        if names:
            y.sin().sum().backward()
        outs.append({name: t.grad for name, t in leaves.items()})
    for name in given:
        assert (outs[0][name] is not None) is (name in names)
        if name in names:
            torch.testing.assert_close(outs[0][name], outs[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("form", ["none", "places"])
@pytest.mark.parametrize("dtype", HALF)
def test_low_rank_in_16_bits(dtype: torch.dtype, form: str) -> None:
    """fp32 factors over activations and a W of 16 bits."""
    x = normal(32, 16, IN).to(dtype)
    fast, spec = fast_and_spec(places(x.shape, form), dtype)

    def run_in(op: Op, wide: torch.dtype | None) -> list[Tensor]:
        leaves = [
            x.to(wide or dtype).requires_grad_(),
            *(t.to(wide or torch.float32).requires_grad_() for t in factors()),
        ]
        y = op(*leaves)
        grads = torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(dtype).to(y.dtype))
        assert [t.dtype for t in (y, *grads)] == [t.dtype for t in (leaves[0], *leaves)]
        return [t.double() for t in (y, *grads)]

    for found, peer, true in zip(
        run_in(fast, None), run_in(spec, None), run_in(spec, torch.float64), strict=True
    ):
        assert (found - true).norm() <= 1.05 * (peer - true).norm()


@pytest.mark.usefixtures("each_arithmetic")
def test_a_weak_update_survives_one_rounding() -> None:
    """A tenth of a bf16 unit, forward and backward: what is left of it along the exact one."""
    n = 64
    x, g = (normal(4096, n, seed=s).bfloat16() for s in (1, 2))
    w = (normal(n, n, seed=3) / n**0.5).bfloat16()
    down, up = normal(4, n, seed=4).float() / n**0.5, 1e-4 * normal(n, 4, seed=5).float()

    def outcome(dtype: torch.dtype, up: Tensor) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        wide = down.to(torch.promote_types(dtype, torch.float32))
        y = low_rank_linear(leaf, lambda dtype: w.to(dtype), wide, up, None, 1.0)
        return [t.detach().double() for t in (y, torch.autograd.grad(y, leaf, g.to(dtype))[0])]

    exact, bare = outcome(torch.float64, up.double()), outcome(torch.float64, 0 * up.double())
    for found, true, without in zip(outcome(torch.bfloat16, up), exact, bare, strict=True):
        change = true - without
        assert change.norm() < 2**-9 * without.norm()
        kept = ((found - without) * change).sum() / change.square().sum()
        standard_error = (found - true).norm() / change.norm() / change.numel() ** 0.5
        assert abs(kept - 1) <= 0.05 + 3 * standard_error
        assert standard_error < 0.05
