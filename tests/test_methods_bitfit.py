"""BitFit: every bias there is; where there is none, added ones, which can be merged in memory and not into files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.core.presets import bare_modules

IDS = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(4))


def moved(adapter: lf.Adapter) -> lf.Adapter:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_it_trains_the_biases_that_there_are(kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    own = {path: m.bias for path, m in bare_modules(model) if isinstance(getattr(m, "bias", None), nn.Parameter)}
    adapter = lf.attach(model, lf.BitFit())
    assert set(adapter.sites) == set(own)
    assert any("ln_" in path for path in own) == (kind == "gpt2")  # norms' biases too
    assert [p.shape for p in adapter.parameters()] == [b.shape for b in own.values()]


def test_a_model_without_biases_gets_them_on_the_linears_of_its_blocks(tiny_model) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, lf.BitFit())
    assert set(adapter.sites) == set(lf.attach(tiny_model("llama"), lf.LoRA()).sites)
    assert all(len(d.offset) == model.get_submodule(path).out_features for path, d in adapter.deltas.items())


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_merged_in_memory_it_computes_the_same(kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    adapter = moved(lf.attach(model, lf.BitFit()))
    with torch.no_grad():
        y = model(IDS).logits
        adapter.merge()
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-6)
    if kind == "llama":
        assert model.model.layers[0].mlp.up_proj.bias.abs().sum() > 0


def test_the_offset_is_exactly_a_bias(tiny_model) -> None:
    """Its gradient is the one that the bias itself would have had."""
    model, plain = tiny_model("gpt2"), tiny_model("gpt2")
    adapter = lf.attach(model, lf.BitFit())
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for path, delta in adapter.deltas.items():
        torch.testing.assert_close(delta.offset.grad, plain.get_submodule(path).bias.grad, rtol=1e-4, atol=1e-7)
