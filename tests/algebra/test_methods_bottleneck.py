"""Bottleneck adapters: where Houlsby's and Pfeiffer's are, and what they compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, relu

import lorafold as lf
from lorafold.methods import METHODS, make_spec

IDS = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(4))
ATTENTION = {"llama": "self_attn", "qwen2": "self_attn", "gemma": "self_attn", "gpt2": "attn"}
BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gemma": "model.layers",
    "gpt2": "transformer.h",
}


@pytest.mark.parametrize("kind", list(ATTENTION))
def test_houlsby_lies_after_both_sublayers_and_pfeiffer_after_the_mlp(kind, tiny_model) -> None:
    model = tiny_model(kind)
    houlsby, pfeiffer = METHODS["houlsby"](size=4), make_spec("pfeiffer", size=4)
    both = {f"{BLOCKS[kind]}.{i}.{part}" for i in range(2) for part in (ATTENTION[kind], "mlp")}
    assert set(lf.attach(model, houlsby, name="houlsby").sites) == both
    adapter = lf.attach(model, pfeiffer, name="pfeiffer")
    assert set(adapter.sites) == {path for path in both if path.endswith("mlp")}
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (2 * 32 * 4 + 32 + 4)


@pytest.mark.parametrize(("activation", "f"), [("gelu", gelu), ("relu", relu)])
@pytest.mark.parametrize("sublayer", ["mlp", "self_attn"])
def test_it_is_its_formula(activation: str, f, sublayer: str, tiny_model) -> None:
    model = tiny_model("llama")
    seen = []
    module = model.model.layers[0].get_submodule(sublayer)
    bare = copy.deepcopy(module)
    delta = lf.attach(model, lf.Bottleneck(size=4, activation=activation)).deltas[
        f"model.layers.0.{sublayer}"
    ]
    for p in delta.parameters():
        nn.init.normal_(p)
    module.register_forward_hook(
        lambda m, args, kwargs, y: seen.append((args, kwargs, y)), with_kwargs=True
    )
    with torch.no_grad():
        model(IDS, use_cache=False)
        args, kwargs, found = seen[0]
        y = bare(*args, **kwargs)
    y, found = (y[0], found[0]) if sublayer == "self_attn" else (y, found)
    expected = y + f(y @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias
    torch.testing.assert_close(found, expected.detach())


def test_a_model_whose_blocks_hold_no_mlp_module_is_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16}
    model = OPTForCausalLM(
        OPTConfig(vocab_size=50, num_hidden_layers=1, num_attention_heads=2, **sizes)
    )
    refused = "'sublayers': OPTForCausalLM has no modules of this preset"
    with pytest.raises(lf.LorafoldError, match=refused):
        lf.attach(model, lf.Bottleneck())


def test_it_does_not_merge_and_wrong_options_are_listed(tiny_model) -> None:
    adapter = lf.attach(tiny_model("gpt2"), lf.Bottleneck(size=2))
    told = r"transformer\.h\.0\.attn: .*\.0\.mlp: .*; and 2 more"
    with pytest.raises(lf.NotMergeable, match=told):
        adapter.merge()
    wrong = r"size: found 0.*activation: found 'tanh'.*after: found 'attention'"
    with pytest.raises(lf.LorafoldError, match=wrong):
        lf.Bottleneck(size=0, activation="tanh", after="attention")


def test_a_mixture_of_experts_gives_its_width() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
    }
    model = MixtralForCausalLM(MixtralConfig(vocab_size=260, num_hidden_layers=1, **sizes)).eval()
    with torch.no_grad():
        bare = model(IDS).logits
        adapter = lf.attach(model, lf.Bottleneck(size=4))
        assert torch.equal(model(IDS).logits, bare)
        for p in adapter.parameters():
            p.add_(0.1)
        assert not torch.equal(model(IDS).logits, bare)
