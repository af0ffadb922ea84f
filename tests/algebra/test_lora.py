"""LoRA and the other low-rank methods: facts of the literature, starts, the fused operation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lorafold as lf
from laws import BASES, METHODS, move, to
from lorafold.core.layer import Layer
from lorafold.layers.dense import Matrix

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 7, generator=torch.Generator().manual_seed(1))


def trained(
    alpha: float, lr: float, lr_b: float, optimizer: type[torch.optim.Optimizer], steps: int
) -> tuple[nn.Module, lf.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7)).double()
    adapter = lf.attach(model, lf.LoRA(rank=3, alpha=alpha, dropout=0.0), ["0"])
    delta = adapter.deltas["0"].double()
    kwargs = {"eps": 1e-30} if optimizer is torch.optim.Adam else {}
    opt = optimizer([{"params": [delta.A], "lr": lr}, {"params": [delta.B], "lr": lr_b}], **kwargs)
    for _ in range(steps):
        opt.zero_grad()
        (model(X.double()) - Y.double()).square().mean().backward()
        opt.step()
    return model, adapter


def test_the_first_gradient_of_A_is_exactly_zero_and_that_of_B_is_not() -> None:
    model = nn.Sequential(nn.Linear(12, 7))
    delta = lf.attach(model, lf.LoRA(rank=3, dropout=0.0), ["0"]).deltas["0"]
    (model(X) - Y).square().mean().backward()
    assert not delta.A.grad.any()
    assert delta.B.grad.any()


def test_gradients_are_those_of_the_paper() -> None:
    """dL/dB = s dL/d(dW) A^T and dL/dA = s B^T dL/d(dW)."""
    model = nn.Sequential(nn.Linear(12, 7)).double()
    delta = lf.attach(model, lf.LoRA(rank=3, alpha=6, dropout=0.0), ["0"]).deltas["0"].double()
    with torch.no_grad():
        delta.B.normal_()
    y = model(X.double())
    g = 2 * (y - Y.double()) / y.numel()
    (y - Y.double()).square().mean().backward()
    dw = g.detach().t() @ X.double()
    assert torch.allclose(delta.B.grad, 2 * dw @ delta.A.t())
    assert torch.allclose(delta.A.grad, 2 * delta.B.t() @ dw)


@pytest.mark.parametrize(("optimizer", "power"), [(torch.optim.Adam, 1), (torch.optim.SGD, 2)])
def test_alpha_is_a_scale_of_the_learning_rate_of_B(optimizer, power) -> None:
    """alpha times c is B's rate times c (Adam) or c squared (SGD), and B times c."""
    c, lr = 4.0, 1e-2
    scaled, _ = trained(alpha=3 * c, lr=lr, lr_b=lr, optimizer=optimizer, steps=5)
    faster, _ = trained(alpha=3, lr=lr, lr_b=lr * c**power, optimizer=optimizer, steps=5)
    plain, _ = trained(alpha=3, lr=lr, lr_b=lr, optimizer=optimizer, steps=5)
    x = X.double()
    assert torch.allclose(scaled(x), faster(x), rtol=1e-9)
    assert (scaled(x) - plain(x)).norm() > 1e-3 * plain(x).norm()


def test_scales_and_inits() -> None:
    assert lf.LoRA(rank=4).scale == 2.0
    assert lf.LoRA(rank=16, alpha=8, rslora=True).scale == 2.0
    model = nn.Sequential(nn.Linear(400, 7))
    kaiming = lf.attach(model, lf.LoRA(rank=100), ["0"], "k").deltas["0"].A
    gaussian = lf.attach(model, lf.LoRA(rank=100, init="gaussian"), ["0"], "g").deltas["0"].A
    assert kaiming.abs().max() <= 1 / 400**0.5
    assert kaiming.std().item() == pytest.approx((1 / 400**0.5) / 3**0.5, rel=0.02)
    assert gaussian.std().item() == pytest.approx(1 / 100, rel=0.02)


def test_dropout_lies_on_the_branch_only_and_in_training_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7))
    delta = lf.attach(model, lf.LoRA(rank=3, dropout=0.5), ["0"]).deltas["0"]
    bare = model.eval()(X)
    model.train()
    assert torch.equal(model(X), bare)  # B is zero, so only dropout outside the branch could show
    with torch.no_grad():
        delta.B.normal_()
    draws = torch.stack([model(X) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    exact = model.eval()(X)
    error = (draws.mean(0) - exact) / (draws.std(0) / 2000**0.5)
    assert error.abs().mean() < 1.2  # |N(0, 1)| has mean 0.8
    assert torch.equal(model(X), exact)


def test_impossible_values_are_refused_all_at_once() -> None:
    wrong = r"rank: found 0.*; dropout: found 1.5.*; init: found 'zero'"
    with pytest.raises(lf.LorafoldError, match=wrong):
        lf.LoRA(rank=0, dropout=1.5, init="zero")
    with pytest.raises(TypeError):
        lf.LoRA(r=8)


LOW_RANK = ["lora", "rslora", "pissa", "olora", "adalora", "vera"]
# VeRA without dropout shares a product among layers instead, as `test_methods_ops` tests
CASES = [(m, p) for m in LOW_RANK for p in (0.0, 0.3) if (m, p) != ("vera", 0.0)]
PLAIN = ("embedding", "convolution", "grouped")
MATRICES = [base for base in BASES if not base.startswith(PLAIN)]


def step(
    method: str, base: str, dropout: float, dtype: torch.dtype = torch.float32, wide: bool = False
) -> tuple[bool, dict[str, Tensor]]:
    """Whether the fused operation ran; output and gradients; wide: in fp64."""
    torch.manual_seed(0)
    make, inputs = BASES[base]
    root = to(nn.Sequential(make()), dtype).train()
    adapter = lf.attach(root, replace(METHODS[method], dropout=dropout), ["0"])
    move(adapter)
    x = inputs(torch.Generator().manual_seed(1)).to(dtype)
    if wide:
        root, x = to(root, torch.float64), x.double()
    x.requires_grad_()
    torch.manual_seed(2)
    y = root(x)
    fused = any("LowRankLinear" in node.name() for node in graph(y.grad_fn))
    (y * y.detach().sin()).sum().backward()
    grads = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(adapter.parameters()))
    return fused, {"y": y.detach(), "x": x.grad, **grads}


def graph(node: torch.autograd.graph.Node | None) -> list[torch.autograd.graph.Node]:
    return (
        []
        if node is None
        else [node, *(n for child, _ in node.next_functions for n in graph(child))]
    )


@pytest.mark.parametrize("base", MATRICES)
@pytest.mark.parametrize(("method", "dropout"), CASES)
def test_fused_and_plain_agree(method: str, base: str, dropout: float, monkeypatch) -> None:
    ours, fused = step(method, base, dropout)
    monkeypatch.setattr(Matrix, "low_rank", Layer.low_rank)
    theirs, plain = step(method, base, dropout)
    assert (ours, theirs) == (True, False)
    assert fused.keys() == plain.keys()
    for name, expected in plain.items():
        assert (fused[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("base", ["linear", "no-bias", "conv1d"])
@pytest.mark.parametrize("method", LOW_RANK)
def test_in_bf16_the_fused_errs_no_more(method: str, base: str, monkeypatch) -> None:
    """Both against the plain path in fp64, from the same bf16 numbers."""
    _, fused = step(method, base, 0.0, torch.bfloat16)
    monkeypatch.setattr(Matrix, "low_rank", Layer.low_rank)
    (_, plain), (_, truth) = (
        step(method, base, 0.0, torch.bfloat16, wide) for wide in (False, True)
    )
    error, peer = (
        sum(((found[name] - true).norm() / true.norm()).square() for name, true in truth.items())
        for found in (fused, plain)
    )
    assert error <= 1.05**2 * peer


def weight() -> torch.Tensor:
    """(96, 64) with a spectrum that falls as those of trained matrices do."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(96, 64))[0], torch.linalg.qr(torch.randn(64, 64))[0]
    return u * torch.arange(1, 65).float().rsqrt() @ v


def laid(spec, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, lf.Adapter]:
    root = nn.Sequential(nn.Linear(64, 96, bias=False))
    with torch.no_grad():
        root[0].weight.copy_(weight())
    root.to(dtype)
    return root, lf.attach(root, spec, ["0"])


@pytest.mark.parametrize("niter", [0, 16])
def test_pissa_starts_from_the_largest_singular_parts(niter: int) -> None:
    _, adapter = laid(lf.PiSSA(rank=5, alpha=10, niter=niter))
    delta = adapter.deltas["0"]
    u, s, vt = torch.linalg.svd(weight(), full_matrices=False)
    best = u[:, :5] * s[:5] @ vt[:5]
    assert (2 * delta.B0 @ delta.A0 - best).norm() <= 1e-4 * best.norm()
    assert torch.allclose(delta.B0.norm(dim=0), delta.A0.norm(dim=1), rtol=1e-4)


def test_olora_starts_from_qr() -> None:
    _, adapter = laid(lf.OLoRA(rank=5))
    delta = adapter.deltas["0"]
    assert torch.allclose(delta.B0.t() @ delta.B0, torch.eye(5), atol=1e-5)
    assert torch.allclose(delta.B0 @ delta.B0.t() @ weight(), delta.B0 @ delta.A0, atol=1e-5)


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("spec", [lf.PiSSA(rank=5), lf.OLoRA(rank=5)], ids=["pissa", "olora"])
def test_a_first_step_survives_in_bf16(spec) -> None:
    """Only the difference B - B0 can hold it: it is under half a unit of B."""
    root, adapter = laid(spec, torch.bfloat16)
    stored = root.state_dict()["0.weight"]
    assert torch.equal(stored, weight().bfloat16())
    delta = adapter.deltas["0"]
    x = torch.randn(4096, 64).bfloat16()
    with torch.no_grad():
        bare = root(x).double()
        for p in adapter.parameters():
            p.add_(1e-4 * torch.randn_like(p))
        change = x.double() @ delta.delta().double().t()
        exact = x.double() @ stored.double().t() + change
        realised = root(x).double() - (exact - change)
    error = (realised - change).norm() / change.norm() / change.numel() ** 0.5
    assert error < 0.05
    assert bare.isfinite().all()
    assert ((realised * change).sum() / change.square().sum()).item() == pytest.approx(
        1, abs=0.05 + 3 * error.item()
    )


def test_a_rank_beyond_the_matrix_is_refused() -> None:
    told = r"found rank 65 for a matrix \(96, 64\), expected at most 64"
    with pytest.raises(lf.LorafoldError, match=told):
        laid(lf.PiSSA(rank=65))
