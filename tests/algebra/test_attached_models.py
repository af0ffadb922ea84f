"""Adapters on whole transformers: what the model must go on doing, for every family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

import lorafold as lf
import noise

KINDS = ["llama", "qwen2", "gemma", "gpt2"]
IDS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))


def moved(model: torch.nn.Module, **options) -> lf.Adapter:
    return noise.moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.0), **options))


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_head_and_embeddings_alone(kind: str, tiny_model) -> None:
    sites = moved(tiny_model(kind)).sites
    per_block = 4 if kind == "gpt2" else 7
    assert len(sites) == 2 * per_block
    assert not [s for s in sites if "head" in s or "embed" in s or "wte" in s]


def test_falcons_own_linear_class_is_a_linear() -> None:
    torch.manual_seed(0)
    model = FalconForCausalLM(
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    adapter = moved(model)
    found = {path.rpartition(".")[2] for path in adapter.sites}
    assert found == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    with torch.no_grad():
        y = model(IDS).logits
        adapter.merge()
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_merge_and_save(kind: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(kind)
    bare = model(IDS).logits
    adapter = moved(model)
    logits = model(IDS).logits
    greedy = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    answer = model.generate(IDS, **greedy)
    model.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(plain).__name__ == type(model).__name__
    assert torch.equal(plain(IDS).logits, bare)
    with lf.only(model):
        assert torch.equal(model(IDS).logits, bare)
    adapter.merge()
    assert (model(IDS).logits - logits).norm() <= 1e-5 * logits.norm()
    assert torch.equal(model.generate(IDS, **greedy), answer)


def test_embedding_tied_to_the_head_is_untied_on_request(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("gemma")
    adapter = moved(model, targets=["embed_tokens", "q_proj"])
    logits = model(IDS).logits
    with pytest.raises(lf.NotMergeable, match=r"model.embed_tokens: its weight is tied to lm_head"):
        adapter.merge()
    adapter.merge(untie_weights=True)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (again(IDS).logits - logits).norm() <= 1e-5 * logits.norm()


def test_trained_biases_and_modules_to_save_are_deltas_too(tiny_model) -> None:
    model = tiny_model("qwen2")
    bare = model(IDS).logits
    adapter = moved(model, bias="lora_only", modules_to_save=["lm_head", "norm"])
    logits = model(IDS).logits
    kinds = {type(d).__name__ for _, d in adapter.parts()}
    assert kinds == {"LoRADelta", "BiasDelta", "ReplaceDelta"}
    with lf.only(model):
        assert torch.equal(model(IDS).logits, bare)
    adapter.merge(untie_weights=True)
    assert (model(IDS).logits - logits).norm() <= 1e-5 * logits.norm()
    assert not [n for n, _ in model.named_parameters() if "deltas" in n]
