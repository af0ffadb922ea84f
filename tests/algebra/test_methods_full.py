"""Full fine-tuning and the linear probe: the weights themselves, in place, once each."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

import lorafold as lf
from lorafold.training_step.param_groups import matrices_in
from method_cases import classifier
from mixtures import mixture

IDS = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_it_holds_the_models_own_parameters_each_once(kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    own = list(model.parameters())
    adapter = lf.attach(model, lf.Full())
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in own}
    assert len(list(adapter.parameters())) == len(own)
    assert len(list(model.parameters())) == len(own)
    assert all(p.requires_grad for p in own)
    assert "100.00%" in repr(adapter)
    twin = copy.deepcopy(model)
    deltas = twin.get_submodule("model.norm" if kind != "gpt2" else "transformer.ln_f")
    assert deltas.deltas["default"].weight is deltas.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_trains_as_the_plain_model_does(kind: str, tiny_model) -> None:
    model, plain = tiny_model(kind), tiny_model(kind)
    adapter = lf.attach(model, lf.Full())
    for one, parameters in ((model, adapter.parameters()), (plain, plain.parameters())):
        optimizer = AdamW(parameters, lr=1e-3, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            one(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = model(IDS).logits
    torch.testing.assert_close(found, plain(IDS).logits.detach(), rtol=1e-4, atol=1e-5)
    adapter.detach()
    assert not any(hasattr(m, "deltas") for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDS).logits, found)


def test_what_it_saves_is_a_plain_model(tiny_model, tmp_path) -> None:
    model = tiny_model("qwen2")
    adapter = lf.attach(model, lf.Full())
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.5)
        y = model(IDS).logits
    saved = adapter.save(tmp_path / "whole")
    loaded, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded).__name__ == "Qwen2ForCausalLM"
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, y)


def test_part_of_a_model_and_other_adapters_beside_it(tiny_model) -> None:
    model = tiny_model("llama")
    lora = lf.attach(model, lf.LoRA(rank=2), name="lora")
    norms = lf.attach(model, lf.Full(), ["norm", "input_layernorm"], name="norms")
    trained = {id(p) for a in (lora, norms) for p in a.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    norms.detach()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in lora.parameters()
    }
    lora.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_does_not_freeze_it(tiny_model) -> None:
    model = tiny_model("llama")
    full = lf.attach(model, lf.Full(), name="full")
    lora = lf.attach(model, lf.LoRA(rank=2), name="lora")
    assert all(p.requires_grad for p in (*full.parameters(), *lora.parameters()))
    lora.detach()
    full.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_it_says_that_it_trains_the_base_and_refuses_what_has_no_weights(tiny_model) -> None:
    assert lf.Full.trains_base
    assert not lf.LoRA.trains_base
    told = "Full trains floating-point weights in place; LlamaMLP has no parameters"
    with pytest.raises(lf.LorafoldError, match=told):
        lf.attach(tiny_model("llama"), lf.Full(), ["mlp"])


def test_a_state_is_loaded_into_the_models_own_weights(tiny_model) -> None:
    model, other = tiny_model("qwen2"), tiny_model("qwen2")
    trained, fresh = lf.attach(model, lf.Full()), lf.attach(other, lf.Full())
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(1.5)
    fresh.load_state_dict({k: v.clone() for k, v in trained.state_dict().items()})
    assert {id(p) for p in fresh.parameters()} == {id(p) for p in other.parameters()}
    fresh.detach()
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_weight_decay_leaves_the_biases_of_experts_as_they_are() -> None:
    model = mixture("gpt-oss")
    full = lf.attach(model, lf.Full())
    shrunk = {id(p) for _, delta in full.parts() for p in matrices_in(delta)}
    for name, p in model.named_parameters():
        vectors = name.endswith("bias") or p.ndim == 1
        assert (id(p) in shrunk) != vectors, name
    assert any(p.ndim == 2 for name, p in model.named_parameters() if name.endswith("_bias"))


TEXTS = torch.randint(3, 250, (6, 7), generator=torch.Generator().manual_seed(4))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_trains_the_head_over_features_that_stay(kind: str) -> None:
    model = classifier(kind)
    with torch.no_grad():
        bare = model(TEXTS).logits
    adapter = lf.attach(model, lf.LinearProbe())
    assert list(adapter.sites) == ["score"]
    assert sum(p.numel() for p in adapter.parameters()) == 3 * 32
    assert torch.equal(model(TEXTS).logits.detach(), bare)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(input_ids=TEXTS, labels=LABELS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    features = {}
    model.score.register_forward_hook(lambda m, args, y: features.update(h=args[0]))
    with torch.no_grad():
        y = model(input_ids=TEXTS).logits
        head = adapter.deltas["score"].copy.weight
        torch.testing.assert_close(y, features["h"][:, -1] @ head.T)
        with lf.only(model):
            assert torch.equal(model(TEXTS).logits, bare)
        adapter.merge()
        torch.testing.assert_close(model(TEXTS).logits, y)
    assert cross_entropy(y, LABELS) < losses[0]


def test_a_model_without_a_head_has_none_to_train() -> None:
    with pytest.raises(lf.LorafoldError, match="'head': LlamaModel has no modules of this preset"):
        lf.attach(classifier("llama").model, lf.LinearProbe())
