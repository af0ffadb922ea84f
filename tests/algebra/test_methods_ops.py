"""The other operations of methods, in values and gradients, and what is computed once."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lorafold as lf
from lorafold.core.rounding import scatter_added
from lorafold.layers import layer_of
from lorafold.ops.attention import document_attention
from lorafold.ops.checkpoint_segments import computed_once
from lorafold.ops.frozen import FEW, product_at, scaled_matrix, scaled_product, sparse_linear
from lorafold.ops.packed_documents import Documents, with_prefix_keys
from noise import moved


def positions(n: int, k: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))[:k].sort().values


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def near(found: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether an error is at most twice that of the plain form in the same dtype."""
    return bool((found - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm())


def test_framed_has_its_gradients() -> None:
    torch.manual_seed(0)
    m = torch.randn(7, 4, dtype=torch.float64)
    assert gradcheck(lambda u, b, d: scaled_product(u, m, b, d), (wide(2, 3, 4), wide(7), wide(4)))
    u, b, d = wide(5, 4), wide(7), wide(4)
    assert torch.allclose(scaled_product(u, m, b, d), u @ torch.diag(d) @ m.t() @ torch.diag(b))
    assert torch.allclose(scaled_matrix(m, b, d), torch.diag(b) @ m @ torch.diag(d))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_sparse_linear_has_its_gradients(k: int) -> None:
    """Few entries and many, whose gradients are computed in different ways."""
    torch.manual_seed(0)
    w, at = torch.randn(16, 24, dtype=torch.float64), positions(16 * 24, k)
    assert (FEW * k <= w.numel()) == (k <= 3)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return sparse_linear(x, w.to, values, at)

    x, values = wide(2, 5, 24), wide(k)
    assert gradcheck(run, (x, values))
    dense = w.flatten().index_put((at,), values, accumulate=True).view_as(w)
    assert torch.allclose(run(x, values), x @ dense.t())
    assert gradcheck(lambda w, values: scatter_added(w, values, at), (wide(16, 24), values))


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("tokens", [1, 300])
def test_gradients_at_few_entries_are_as_good_as_a_whole_product_s(tokens: int) -> None:
    torch.manual_seed(0)
    g, x, at = torch.randn(tokens, 96), torch.randn(tokens, 128), positions(96 * 128, 90)
    half = g.bfloat16(), x.bfloat16()
    exact = (half[0].double().t() @ half[1].double()).flatten()[at]
    plain = (half[0].t() @ half[1]).flatten()[at].double()
    assert FEW * len(at) <= 96 * 128
    assert near(product_at(*half, at).double(), plain, exact)


def test_a_value_in_16_bits_is_rounded_once_and_the_others_stay() -> None:
    torch.manual_seed(0)
    w, at = torch.randn(64, 64).bfloat16(), positions(64 * 64, 100)
    values = 1e-4 * torch.randn(100)
    changed = scatter_added(w, values, at)
    others = w.flatten().index_put((at,), changed.flatten()[at])
    assert torch.equal(changed.flatten(), others)
    assert (changed != w).any()
    assert torch.equal(scatter_added(w, torch.zeros(100), at), w)


def adapted(spec: lf.VeRA) -> tuple[nn.ModuleDict, Tensor]:
    """q and k read one input, o another one of the same size."""
    torch.manual_seed(0)
    root = nn.ModuleDict({"q": nn.Linear(24, 32), "k": nn.Linear(24, 8), "o": nn.Linear(24, 16)})
    moved(lf.attach(root, spec, ["q", "k", "o"]))
    return root, torch.randn(50, 24, requires_grad=True)


def outputs(root: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    inner = x * 2
    return [root["q"](inner), root["k"](inner), root["o"](x * 3)]


def gradients(root: nn.ModuleDict, x: Tensor, run=outputs) -> list[Tensor]:
    loss = sum(y.square().sum() for y in run(root, x))
    return list(torch.autograd.grad(loss, [x, *(p for p in root.parameters() if p.requires_grad)]))


def test_vera_s_first_product_is_computed_once_for_all_that_read_an_input() -> None:
    root, x = adapted(lf.VeRA(rank=6))
    with FlopCounterMode(display=False) as counter:
        outputs(root, x)
    base, first, second = 2 * 50 * 24 * 56, 2 * (2 * 50 * 6 * 24), 2 * 50 * 6 * 56
    assert counter.get_total_flops() == base + first + second


def test_vera_s_gradients_are_those_of_its_folded_weight() -> None:
    root, x = adapted(lf.VeRA(rank=6))

    def folded(root: nn.ModuleDict, x: Tensor) -> list[Tensor]:
        inputs = {"q": x * 2, "k": x * 2, "o": x * 3}
        weights = {n: root[n].deltas["default"].fold(*layer_of(root[n]).dense()) for n in inputs}
        return [nn.functional.linear(inputs[n], *weights[n]) for n in inputs]

    for a, b in zip(gradients(root, x), gradients(root, x, folded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_computed_once_may_be_replayed_and_follows_its_input() -> None:
    root, x = adapted(lf.VeRA(rank=6))
    expected = gradients(root, x)

    def replayed(root: nn.ModuleDict, x: Tensor) -> list[Tensor]:
        inner = x * 2
        run = [checkpoint(root[n], inner, use_reentrant=False) for n in ("q", "k")]
        return [*run, *checkpoint(lambda x: outputs(root, x)[2:], x, use_reentrant=False)]

    for a, b in zip(gradients(root, x, replayed), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        inner = torch.randn(5, 24)
        y = root["q"](inner)
        inner.add_(1)
        assert not torch.equal(root["q"](inner), y)
        assert torch.equal(root["q"](inner), root["q"](inner.clone()))
        root["q"].deltas["default"].projections.A.mul_(2)
        assert torch.equal(root["q"](inner), root["q"](inner.clone()))
    # a value without a graph is none for a run that needs one
    a = torch.randn(24, requires_grad=True)
    with torch.no_grad():
        computed_once(x, (a,), lambda: x * 2)
    assert computed_once(x, (a,), lambda: x * 2).requires_grad


@pytest.mark.parametrize("rank", [2, 9])
def test_loha_runs_as_factors_only_while_they_are_small(rank: int) -> None:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(32, 48)).double()
    delta = lf.attach(root, lf.LoHa(rank=rank, alpha=3), ["0"]).deltas["0"].double()
    assert delta.small == (rank == 2)
    with torch.no_grad():
        for p in delta.parameters():
            p.normal_()
    x = wide(5, 32)
    w, b = delta.fold(*layer_of(root[0]).dense())
    runs = [root(x), nn.functional.linear(x, w, b)]
    found, expected = (
        torch.autograd.grad(y.square().sum(), [x, *delta.parameters()]) for y in runs
    )
    for a, b in zip([runs[0], *found], [runs[1], *expected], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_documents_behind_tokens_in_front(batch: int, shared: bool) -> None:
    """Attention of tiles against a whole mask, in values and in gradients."""
    if shared and batch > 1:
        pytest.skip("documents that share tokens are one sequence")
    torch.manual_seed(0)
    n, cpu = 3, torch.device("cpu")
    docs = Documents((4, 6, 1, 9))
    if shared:
        docs = Documents.with_shared_prefixes([7, 9, 6], [0, 4, 0], cpu)
    tokens = sum(docs.own)
    fronted = with_prefix_keys(docs, n, batch, cpu)
    mask = docs.dense(batch, cpu)
    seen = fronted.dense(batch, cpu)
    assert seen.shape == (batch, 1, tokens // batch, n + tokens // batch)
    assert seen[..., :n].all()
    assert torch.equal(seen[..., n:], mask)
    q, k, v = wide(tokens, 4, 8), *(wide(tokens + n * batch, 2, 8) for _ in range(2))

    def plain() -> Tensor:
        qs, ks, vs = (
            x.unflatten(0, (batch, -1)).transpose(1, 2).repeat_interleave(r, 1)
            for x, r in ((q, 1), (k, 2), (v, 2))
        )
        scores = (qs @ ks.mT * 0.3).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ vs).transpose(1, 2).flatten(0, 1)

    runs = [document_attention(q, k, v, fronted, 0.3), plain()]
    found, expected = (torch.autograd.grad(y.square().sum(), [q, k, v]) for y in runs)
    for a, b in zip([runs[0], *found], [runs[1], *expected], strict=True):
        torch.testing.assert_close(a, b)
