"""DoRA beyond the laws: small magnitudes survive, the base runs once, norms need no matrix."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafold as lf
import noise
from lorafold.core.contexts import unchanged
from lorafold.core.delta import LowRank
from lorafold.core.rounding import rounded
from lorafold.layers import layer_of
from lorafold.methods import make_spec
from lorafold.methods.dora import DoRADelta
from lorafold.ops.scale_and_add import plain_scale_and_add, scale_and_add

DORA = lf.DoRA(lf.LoRA(rank=4, dropout=0.0))


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128, bias=bias)).to(dtype)


def moved(adapter: lf.Adapter) -> DoRADelta:
    return noise.moved(adapter).deltas["0"]


def survival(realised: torch.Tensor, change: torch.Tensor) -> tuple[float, float]:
    """The projection of the change on the exact one, and its standard error."""
    error = (realised - change).norm() / change.norm() / change.numel() ** 0.5
    return ((realised * change).sum() / change.square().sum()).item(), error.item()


@pytest.mark.few(7)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(
    "spec",
    [lf.DoRA(lf.LoRA(dropout=0.0)), lf.IA3(feedforward=[]), lf.IA3(feedforward=["0"])],
    ids=str,
)
def test_a_small_gain_survives_in_bf16(spec, size: float) -> None:
    """Rounded to the nearest, a gain within 1 +- 2^-9 changes no output."""
    root = layer(torch.bfloat16, bias=False)
    name = "0.magnitude" if isinstance(spec, lf.DoRA) else "0.l"
    vector = dict(lf.attach(root, spec, ["0"]).named_parameters())[name]
    x = torch.randn(8192, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        bare = root(x).double()
        generator = torch.Generator().manual_seed(3)
        vector.mul_(1 + size * torch.randn(vector.shape, generator=generator))
        exact = copy.deepcopy(root).double()
        with lf.only(exact):
            start = exact(x.double())
        kept, error = survival(root(x).double() - bare, exact(x.double()) - start)
    assert error < 0.05
    # below 1 in 128 of a unit the dither is coarser than the change: its bits hold the 128
    # mantissas of a binade
    assert kept == pytest.approx(1, abs=0.05 + 3 * error)


def test_a_value_on_the_grid_stays_and_rounding_is_unbiased() -> None:
    grid = torch.randn(1 << 16).bfloat16()
    assert torch.equal(rounded(grid.float(), torch.bfloat16), grid)
    v = torch.randn(1 << 18)
    unit = 2.0 ** (v.abs().log2().floor() - 7)
    error = (rounded(v, torch.bfloat16).float() - v) / unit
    assert error.abs().max() <= 1
    # a uniform remainder f has variance f (1 - f): 1/6
    assert abs(error.mean().item()) < 4 * (1 / 6) ** 0.5 / v.numel() ** 0.5
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45])
    kept = rounded(special, torch.bfloat16)
    assert torch.equal(kept[:4].float(), special[:4])
    assert kept[4].isnan()
    assert kept[5].isfinite()


def test_scale_is_its_specification() -> None:
    torch.manual_seed(0)
    y = torch.randn(3, 50, 40).bfloat16().requires_grad_()
    g, c = (torch.randn(40, requires_grad=True) for _ in range(2))
    onto = torch.randn(40, requires_grad=True)
    upstream = torch.randn(3, 50, 40).bfloat16()
    results = []
    for f in (scale_and_add, plain_scale_and_add):
        z = f(y, g, c, onto)
        results.append((z, *torch.autograd.grad(z, (y, g, c, onto), upstream)))
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype == plain.dtype
        # gradients are rounded to bf16 in both; sums over 150 rows are of numbers so rounded
        allowed = torch.finfo(torch.bfloat16).eps * plain.float().norm()
        assert (fast.float() - plain.float()).norm() <= allowed
    assert torch.equal(results[0][0], results[1][0])


def test_the_base_runs_once_with_dropout() -> None:
    root = layer()
    adapter = lf.attach(root, lf.DoRA(lf.LoRA(rank=4, dropout=0.5)), ["0"])
    delta = moved(adapter)
    x = torch.randn(64, 96)
    from torch.utils.flop_counter import FlopCounterMode

    root.train()
    with FlopCounterMode(display=False) as counter:
        root(x)
    base, low = 2 * 64 * 96 * 128, 2 * 64 * 4 * (96 + 128)
    norms = 2 * 4 * (128 * 96 + 4 * 96 + 4 * 128)
    assert counter.get_total_flops() <= base + low + norms
    torch.manual_seed(1)
    y = root(x)
    torch.manual_seed(1)
    with lf.only(root):
        bare = root(x)
    # drawn anew from the same seed, since the bare layer draws nothing
    branch = delta.inner(root[0].layer(), x) - bare
    with torch.no_grad():
        g = delta.magnitude / delta.row_norms(root[0].layer())
    assert torch.allclose(y, g * (bare - root[0].bias + branch) + root[0].bias, atol=1e-5)


def test_norms_are_kept_only_while_nothing_changes() -> None:
    root = layer()
    delta = moved(lf.attach(root, DORA, ["0"]))
    root.eval()
    x = torch.randn(5, 96)

    def law_holds() -> bool:
        w, b = delta.fold(*layer_of(root[0]).dense())
        return torch.allclose(root(x), x @ w.t() + b, atol=1e-5)

    with torch.no_grad():
        assert law_holds()
        first = delta.norms.value
        assert law_holds()
        assert delta.norms.value is first
        delta.inner.B.add_(1)
        assert law_holds()
        root[0].weight.mul_(2)
        assert law_holds()
        assert delta.norms.value is not first
        delta.train()
        assert law_holds()
        # leaves no version behind, as some optimizers do
        delta.inner.B.data = delta.inner.B.data + 1
        assert law_holds()


def counted(monkeypatch) -> list[DoRADelta]:
    """Grows by one entry whenever norms are computed."""
    calls: list = []
    plain = LowRank.row_squares

    def row_squares(self, *args):
        calls.append(self)
        return plain(self, *args)

    monkeypatch.setattr(LowRank, "row_squares", row_squares)
    return calls


def test_norms_are_computed_once_for_the_micro_batches_of_a_step(monkeypatch) -> None:
    root, plain = layer(), layer()
    spec = DORA
    adapter, other = (lf.attach(m, spec, ["0"]) for m in (root, plain))
    for each in (adapter, other):
        moved(each)
        for p, q in zip(each.parameters(), adapter.parameters(), strict=True):
            p.data.copy_(q)
    # this optimizer changes parameters without changing their version
    made = (torch.optim.AdamW(each.parameters(), lr=0.1, fused=True) for each in (adapter, other))
    optimizers = list(made)
    batches = torch.randn(3, 3, 5, 96)
    calls = counted(monkeypatch)
    for step in batches:
        calls.clear()
        with unchanged():
            for x in step:
                root(x).square().sum().backward()
        assert len(calls) == 1
        for x in step:
            plain(x).square().sum().backward()
        assert len(calls) == 4
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(adapter.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(root.eval()(x), plain.eval()(x))


def test_norms_are_kept_for_a_block_that_is_replayed(monkeypatch) -> None:
    root = layer()
    adapter = lf.attach(root, lf.DoRA(lf.LoRA(rank=4, dropout=0.5)), ["0"])
    moved(adapter)
    x = torch.randn(5, 96, requires_grad=True)

    def gradients(run) -> list[torch.Tensor]:
        torch.manual_seed(1)
        return list(torch.autograd.grad(run(x).square().sum(), [x, *adapter.parameters()]))

    expected = gradients(root)
    calls = counted(monkeypatch)
    found = gradients(lambda x: checkpoint(root, x, use_reentrant=False))
    assert len(calls) == 1
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_norms_follow_a_factor_and_a_delta_below_within_a_step() -> None:
    root = layer()
    delta = moved(lf.attach(root, DORA, ["0"], name="above"))
    x = torch.randn(5, 96)

    def law_holds() -> bool:
        w, b = root[0].layer(*root[0].selection.names).dense()
        return torch.allclose(root(x), x @ w.t() + b, atol=1e-5)

    with unchanged(), torch.no_grad():
        assert law_holds()
        for name in ("A", "B"):
            getattr(delta.inner, name).add_(0.1)
            assert law_holds(), name
        root[0].weight.mul_(2)
        assert law_holds()
    root = layer()
    below = lf.attach(root, lf.LoRA(rank=4, dropout=0.0), ["0"], name="below")
    moved(lf.attach(root, lf.DoRA(lf.LoRA(rank=2, dropout=0.0)), ["0"], name="above"))
    with unchanged(), torch.no_grad():
        for _ in range(2):
            below.deltas["0"].B.add_(torch.randn(128, 4))
            assert law_holds()


def test_a_copy_and_a_file_have_no_norms_of_their_own() -> None:
    root = layer()
    delta = moved(lf.attach(root, DORA, ["0"]))
    x = torch.randn(5, 96)
    with unchanged():
        y = root(x)
        assert delta.norms.value is not None
        for twin in (copy.deepcopy(root), pickle.loads(pickle.dumps(root))):
            kept = twin[0].deltas["default"]
            assert kept.norms.value is kept.own.value is None
            assert kept.norms.sources == kept.own.sources == ()
            assert torch.equal(twin(x), y)
    assert set(delta.state_dict()) == {"magnitude", "inner.A", "inner.B"}


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        root = layer()
        delta = moved(lf.attach(root, DORA, ["0"]))
        for mode in (True, False):
            root.train(mode)
            x = torch.randn(5, 96)
            w, b = delta.fold(*layer_of(root[0]).dense())
            assert torch.allclose(root(x), x @ w.t() + b, atol=1e-5)


def test_rows_of_zeros_have_no_direction() -> None:
    root = layer()
    with torch.no_grad():
        root[0].weight[3] = 0
    adapter = lf.attach(root, DORA, ["0"])
    moved(adapter)
    y = root(torch.randn(5, 96))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_over_another_adapter() -> None:
    """The magnitude lies over whatever is beneath: the norms are then those of the whole sum."""
    root = layer()
    below, above = (
        noise.moved(lf.attach(root, spec, ["0"], name=type(spec).__name__), 0.3)
        for spec in (lf.LoRA(rank=4, dropout=0.0), lf.DoRA(lf.LoRA(rank=2, dropout=0.0)))
    )
    x = torch.randn(5, 96)
    y = root(x)
    below.merge()
    assert torch.allclose(root(x), y, atol=1e-5)
    above.merge()
    assert torch.allclose(root(x), y, atol=1e-5)


def test_by_its_word_options_reach_what_lies_beneath() -> None:
    assert make_spec("dora") == lf.DoRA()
    assert make_spec("dora", rank=8, dropout=0.0) == lf.DoRA(lf.LoRA(rank=8, dropout=0.0))
    assert make_spec("dora", over="loha", rank=4) == lf.DoRA(lf.LoHa(rank=4))
    assert make_spec("dora", over="dora", rank=4) == lf.DoRA(lf.DoRA(lf.LoRA(rank=4)))
    with pytest.raises(lf.LorafoldError, match="no option ranks"):
        make_spec("dora", ranks=8)
    with pytest.raises(lf.LorafoldError, match="expected an additive method"):
        lf.attach(layer(), lf.DoRA(lf.IA3()), ["0"])
    with pytest.raises(lf.LorafoldError, match="expected an additive method"):
        lf.attach(layer(), lf.DoRA(lf.DoRA()), ["0"])


def test_the_up_factor_inside_learns_at_its_own_rate() -> None:
    assert lf.attach(layer(), lf.DoRA(), ["0"]).deltas["0"].up_names == ("inner.B",)
