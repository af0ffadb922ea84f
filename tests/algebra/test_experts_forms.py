"""Experts whose class is a row of `core.matrices`: what their forwards compute and what they
leave out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorafold as lf
from lorafold.core.anatomy import Anatomy
from lorafold.core.matrices import Matrices
from lorafold.ops.grouped import grouped
from mixtures import FORMS, mixture

IDS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(name: str) -> tuple[Any, lf.Adapter]:
    model = mixture(name)
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05)
    return model, adapter


def test_only_the_chosen_experts_of_a_token_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's own forward multiplies each of the 24 tokens by all 4 experts, here by 2."""
    seen: list[int] = []
    plain = grouped
    monkeypatch.setattr(
        "lorafold.layers.experts.grouped",
        lambda of, number: seen.append(len(of)) or plain(of, number),
    )
    model, _ = adapted("llama4")
    with torch.no_grad():
        model(IDS)
    assert seen == [2 * IDS.numel()] * 2


@pytest.mark.parametrize("share", ["all", "half", "none"])
def test_experts_without_matrices_give_back_their_input(share: str) -> None:
    """LongCat's are those past its 4 experts."""
    model, adapter = adapted("longcat")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    x, weights = torch.randn(6, 64, requires_grad=True), torch.rand(6, 2)
    index = torch.tensor({"all": [[4, 5]], "half": [[5, 1]], "none": [[0, 3]]}[share] * 6)
    y = experts(x, index, weights)
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    adapter.merge()
    expected = experts(x, index, weights)  # by its own forward
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sin().sum(), x)[0])
    if share == "all":
        torch.testing.assert_close(y, x * weights.sum(1, keepdim=True))


@pytest.mark.parametrize(("name", "child"), [("llama4", "feed_forward"), ("dbrx", "ffn.experts")])
def test_experts_apart_from_what_routes_to_them_are_refused(name: str, child: str) -> None:
    model = mixture(name)
    holder = next(
        m.owner
        for path, m in Anatomy.of(model).modules
        if isinstance(m, Matrices) and f".{child}." in path
    )
    expected = f"found a {type(holder).__name__} alone, expected one in the module that routes"
    with pytest.raises(lf.LorafoldError, match=expected):
        lf.attach(holder, lf.LoRA(rank=2), list(dict(holder.named_parameters())))
    assert not any(isinstance(m, Matrices) for m in holder.modules())


@pytest.mark.parametrize("name", FORMS)
def test_the_model_has_its_own_forward_again_when_an_adapter_leaves(name: str) -> None:
    model = mixture(name)
    before = [type(m) for m in model.modules()]
    adapter = lf.attach(model, lf.LoRA(rank=2))
    assert [type(m) for m in model.modules()] != before
    stored = model.state_dict()
    other = mixture(name)
    lf.attach(other, lf.LoRA(rank=2))
    other.load_state_dict(stored, strict=True)
    adapter.detach()
    assert [type(m) for m in model.modules()] == before
