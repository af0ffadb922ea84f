"""What the literature says of LoRA, as facts about ours."""

import pytest
import torch
from torch import nn

import lorafold as lf

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
def test_alpha_is_a_scale_of_the_learning_rate_of_B(
    optimizer: type[torch.optim.Optimizer], power: int
) -> None:
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
