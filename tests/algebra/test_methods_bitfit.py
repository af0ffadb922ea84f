"""BitFit: every bias there is, or added ones, which merging switches on in the config."""


import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lorafold as lf
from lorafold.core.anatomy import Anatomy
from noise import moved

IDS = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_it_trains_the_biases_that_there_are(kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    own = {
        path: m.bias
        for path, m in Anatomy.of(model).modules
        if isinstance(getattr(m, "bias", None), nn.Parameter)
    }
    adapter = lf.attach(model, lf.BitFit())
    assert set(adapter.sites) == set(own)
    assert any("ln_" in path for path in own) == (kind == "gpt2")  # norms' biases too
    assert [p.shape for p in adapter.parameters()] == [b.shape for b in own.values()]


def test_a_model_without_biases_gets_them_on_the_linears_of_its_blocks(tiny_model) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, lf.BitFit())
    assert set(adapter.sites) == set(lf.attach(tiny_model("llama"), lf.LoRA()).sites)
    assert all(
        len(d.offset) == model.get_submodule(path).out_features
        for path, d in adapter.deltas.items()
    )


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_merged_in_memory_it_computes_the_same_and_is_saved(kind, tiny_model, tmp_path) -> None:
    model = tiny_model(kind)
    adapter = moved(lf.attach(model, lf.BitFit()))
    with torch.no_grad():
        y = model(IDS).logits
        adapter.merge()
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, y, rtol=1e-4, atol=1e-6
        )
    if kind == "llama":
        assert (model.config.attention_bias, model.config.mlp_bias) == (True, True)


def test_biases_of_some_linears_bring_zeros_for_those_that_share_their_switch(tiny_model) -> None:
    model = tiny_model("llama")
    moved(lf.attach(model, lf.BitFit(), ["q_proj"])).merge()
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.bias.abs().sum() > 0
    assert torch.equal(attention.o_proj.bias, torch.zeros(32))
    assert model.model.layers[0].mlp.up_proj.bias is None
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, False)


def test_a_bias_that_no_config_gives_is_refused(tiny_model) -> None:
    model = tiny_model("gemma")
    adapter = moved(lf.attach(model, lf.BitFit()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    told = r"mlp\.gate_proj.*adds a bias.*GemmaForCausalLM can't have one"
    with pytest.raises(lf.NotMergeable, match=told):
        adapter.merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_offset_is_exactly_a_bias(tiny_model) -> None:
    """Its gradient is the one that the bias itself would have had."""
    model, plain = tiny_model("gpt2"), tiny_model("gpt2")
    adapter = lf.attach(model, lf.BitFit())
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for path, delta in adapter.deltas.items():
        torch.testing.assert_close(
            delta.offset.grad, plain.get_submodule(path).bias.grad, rtol=1e-4, atol=1e-7
        )
