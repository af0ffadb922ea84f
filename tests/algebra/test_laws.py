"""Every method keeps the laws on every base, compiles, and is as exact in 16 bits as the layer."""

import copy
from collections.abc import Callable

import pytest
import torch

import lorafold as lf
from laws import BASES, CASES, LAWS, adapted, move, to
from lorafold.core.delta import Dense
from lorafold.layers import layer_of


@pytest.mark.few(600)
@pytest.mark.parametrize(("method", "base"), CASES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_law_holds(law: Callable[[str, str], None], method: str, base: str) -> None:
    law(method, base)


# the fast tests compile one base of each kind
COMPILED = {"linear", "conv1d", "embedding", "nf4", "fp8", "convolution-1d"}


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("method", "base"),
    [
        pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] * slow)
        for case in CASES
        for slow in [case.values[1] not in COMPILED]
    ],
)
def test_compiles_in_one_graph(method: str, base: str) -> None:
    torch._dynamo.reset()
    root, x, adapter = adapted(method, base)
    move(adapter)
    compiled = torch.compile(root, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), root(x), rtol=1e-5, atol=1e-6)
    with lf.only(root):
        assert torch.allclose(compiled(x), root(x), rtol=1e-5, atol=1e-6)


@pytest.mark.few(36)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize(("method", "base"), CASES)
def test_a_small_update_survives_in_bf16(method: str, base: str) -> None:
    """The change of the output along the exact one, far under half a unit of bf16."""
    if base == "embedding":
        pytest.skip(
            "an embedding's output has nothing beneath the rounding: rows are stored values"
        )
    torch.manual_seed(0)
    root, x, adapter = adapted(method, base, torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    x = torch.cat([BASES[base][1](generator) for _ in range(273)]).bfloat16()
    move(adapter, 1e-2)
    exact = to(copy.deepcopy(root), torch.float64)
    with torch.no_grad():
        with lf.only(exact):
            bare = exact(x.double())
        change = exact(x.double()) - bare
        realised = root(x).double() - bare
    kept = ((realised * change).sum() / change.square().sum()).item()
    # of the weights, or of every output
    weights = layer_of(root[0]).dense()[0].numel()
    roundings = weights if isinstance(adapter.deltas["0"], Dense) else change.numel()
    # of a projection, under rounding's noise
    standard_error = ((realised - change).norm() / change.norm() / roundings**0.5).item()
    assert standard_error < 0.1
    assert kept == pytest.approx(1, abs=0.05 + 3 * standard_error)


@pytest.mark.few(240)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize(("method", "base"), CASES)
def test_bf16_is_as_exact_as_the_bare_layer(method: str, base: str) -> None:
    """A dither has three times the variance of rounding to the nearest."""
    root, x, adapter = adapted(method, base, torch.bfloat16)
    move(adapter)
    exact = to(copy.deepcopy(root), torch.float64)
    wide = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        y, folded = exact(wide), copy.deepcopy(exact)
        w, b = folded[0].deltas["default"].fold(*layer_of(folded[0]).dense())
        layer = layer_of(folded[0])
        law = layer.op(wide, w)
        assert (law if b is None else law + layer.each(b)).sub(y).norm() <= 1e-10 * y.norm()
        assert root(x).dtype is torch.bfloat16
        # of one rounding to the nearest, relative to the binade's foot
        unit = torch.finfo(torch.bfloat16).eps / 12**0.5
        assert (root(x).double() - y).norm() <= 3 * unit * y.norm()
