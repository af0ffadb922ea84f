"""Low-rank methods: the fused operation has the gradients of the plain path, with dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lorafold as lf
from laws import BASES, METHODS, move, to
from lorafold.core.layer import Layer
from lorafold.layers.dense import Matrix

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
