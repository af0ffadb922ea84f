"""The state dict of a model with adapters brings them back, and a base's loads beneath them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lorafold as lf
from lorafold.core.attach import base_state
from lorafold.methods import METHODS
from lorafold.models.weights import InMemory
from method_cases import IDS, attached, moved
from mixtures import mixture
from trainer_cases import SETTINGS, rows


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def carried(state: dict[str, Tensor]) -> set[str]:
    return {key for key in state if ".deltas." in key}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear-probe"])
def test_it_holds_the_adapter_and_brings_it_back(method: str, tiny_model) -> None:
    model = tiny_model("llama")
    names = set(model.state_dict())
    adapter = moved(attached(model, method))
    state = {key: t.clone() for key, t in model.state_dict().items()}
    assert set(state) - names == carried(state)
    assert bool(carried(state)) is (method != "full")  # which trains the base's own tensors
    assert set(base_state(model)) == names
    assert set(InMemory.of_model(model).tensors) <= names
    expected = logits(model)
    for p in adapter.parameters():
        nn.init.normal_(p)
    assert not torch.equal(logits(model), expected)
    found = model.load_state_dict(state)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(logits(model), expected)
    other = tiny_model("llama")
    attached(other, method)
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected)


def test_a_base_s_own_state_loads_beneath_and_half_an_adapter_does_not(tiny_model) -> None:
    model = tiny_model("llama")
    for name in ("sft", "dpo"):
        moved(lf.attach(model, lf.LoRA(rank=2), ["q_proj", "k_proj"], name=name))
    state, base = dict(model.state_dict()), base_state(model)
    before = logits(model)
    model.load_state_dict(base)
    without = {key: t for key, t in state.items() if ".deltas.dpo." not in key}
    model.load_state_dict(without)
    assert torch.equal(logits(model), before)
    for lost in (".0.self_attn.q_proj.deltas.dpo.", ".1.self_attn.k_proj.deltas.sft.A"):
        half = {key: t for key, t in state.items() if lost not in key}
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*deltas") as raised:
            model.load_state_dict(half)
        lost_tensors = {key for key in set(state) - set(half) if not key.endswith(".settings")}
        assert str(raised.value).count(".deltas.") == len(lost_tensors)
    # the state of an adapter that the model does not carry
    plain = tiny_model("llama")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
        plain.load_state_dict(state)


def test_a_module_with_something_else_of_that_name_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].deltas = nn.Linear(4, 4)
    with pytest.raises(lf.LorafoldError, match="0: the module has its own attribute `deltas`"):
        lf.attach(model, lf.LoRA(rank=2), ["0"])


def test_saved_whole_it_opens_as_the_base(tiny_model, tmp_path, caplog, monkeypatch) -> None:
    model = tiny_model("qwen2")
    bare = logits(model)
    adapter = moved(attached(model, "lora"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "whole")
    assert carried(load_file(tmp_path / "whole" / "model.safetensors"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert "deltas.default" in caplog.text
    assert torch.equal(logits(again), bare)
    # and with the adapter, once it is attached
    attached(again, "lora")
    again.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"), strict=False)
    assert torch.equal(logits(again), expected)
    adapter.detach()
    model.save_pretrained(tmp_path / "plain")
    assert not carried(load_file(tmp_path / "plain" / "model.safetensors"))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_over_a_quantized_base(storage: str, tiny_model_dir) -> None:
    def made() -> tuple[Any, lf.Adapter]:
        model = lf.load_model(tiny_model_dir("llama-wide"), storage=storage)
        return model, moved(attached(model, "lora"))

    model, _ = made()
    state, expected = {k: t.clone() for k, t in model.state_dict().items()}, logits(model)
    other, adapter = made()
    for p in adapter.parameters():
        nn.init.zeros_(p)
    assert not torch.equal(logits(other), expected)
    found = other.load_state_dict(state, strict=False)
    assert not [key for key in (*found.missing_keys, *found.unexpected_keys) if "deltas" in key]
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_over_experts(family: str, tmp_path: Path) -> None:
    """transformers writes these matrices one by one, by names that it finds adapters under."""
    model = mixture(family)
    names = set(model.state_dict())
    adapter = moved(lf.attach(model, lf.LoRA(rank=3, dropout=0.0)))
    state, expected = {k: t.clone() for k, t in model.state_dict().items()}, logits(model)
    assert set(base_state(model)) == names
    assert set(state) - names == carried(state)
    model.save_pretrained(tmp_path / "whole")
    written = load_file(tmp_path / "whole" / "model.safetensors")
    assert carried(written) == carried(state)
    for values in (state, written):
        for p in adapter.parameters():
            nn.init.zeros_(p)
        found = model.load_state_dict(values, strict=values is state)
        assert not [key for key in found.missing_keys if "deltas" in key]
        assert torch.equal(logits(model), expected)


def trained(model_dir: Path, out: Path, spec: Any, resume: bool, stack: bool) -> lf.Adapter:
    """A run of Trainer without the callback, with its default settings."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if stack:
        moved(lf.attach(model, lf.LoRA(rank=2), name="sft")).requires_grad_(False)
    adapter = lf.attach(model, spec, name="run")
    arguments = TrainingArguments(str(out), **SETTINGS)
    Trainer(model, arguments, train_dataset=rows()).train(
        resume_from_checkpoint=str(out / "checkpoint-3") if resume else None
    )
    return adapter


SPECS = {
    "lora": lf.LoRA(rank=4, dropout=0.1),
    "dora": lf.DoRA(lf.LoRA(rank=4, dropout=0.1)),
    "ia3": lf.IA3(),
    "stack": lf.LoRA(rank=4, dropout=0.1),
}


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dora", "ia3", "stack"))]
)
def test_a_trainer_resumes_without_the_callback(name, tiny_model_dir, tmp_path, caplog) -> None:
    model_dir, spec, stack = tiny_model_dir("llama"), SPECS[name], name == "stack"
    straight = trained(model_dir, tmp_path, spec, False, stack).state_dict()
    with caplog.at_level("WARNING"):
        again = trained(model_dir, tmp_path, spec, True, stack).state_dict()
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text
    at_three = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for key, value in straight.items():
        assert torch.equal(value, again[key]), key
    assert len(carried(at_three)) == len(straight) * (1 + stack)
    assert any(not torch.equal(v, at_three[key.replace("proj.", "proj.deltas.run.")])
               for key, v in straight.items())  # fmt: skip


OTHERS: list[tuple[Any, Any, str]] = [
    (lf.LoRA(rank=4, alpha=8), lf.LoRA(rank=4, alpha=32), "scale 2.0, expected 8.0"),
    (lf.LoRA(rank=4, alpha=8), lf.LoRA(rank=4, alpha=8, rslora=True), "scale 2.0, expected 4.0"),
    (lf.DoRA(lf.LoRA(rank=4, alpha=4)), lf.DoRA(lf.LoRA(rank=4)), "inner.scale"),
    (lf.PiSSA(rank=4, alpha=8), lf.PiSSA(rank=4), "scale"),
    (lf.OLoRA(rank=4, alpha=8), lf.OLoRA(rank=4), "scale"),
    (lf.AdaLoRA(rank=2, init_rank=4, alpha=4), lf.AdaLoRA(rank=2, init_rank=4), "scale"),
    (lf.LoHa(rank=2, alpha=4), lf.LoHa(rank=2), "scale"),
    (lf.LoKr(rank=2, alpha=4), lf.LoKr(rank=2), "scale"),
    (lf.VeRA(rank=4), lf.VeRA(rank=4, projection_prng_key=1), "projections.key 0, expected 1"),
    (lf.Bottleneck(size=4, activation="relu"), lf.Bottleneck(size=4), "activation"),
    (lf.Fastfood(dimension=8), lf.Fastfood(dimension=8, seed=1), "seed 0, expected 1"),
]


@pytest.mark.parametrize(("one", "other", "told"), OTHERS)
def test_a_state_that_would_compute_otherwise_is_refused(one, other, told, tiny_model) -> None:
    model, second = tiny_model("llama"), tiny_model("llama")
    adapter, to = lf.attach(model, one), lf.attach(second, other)
    before = {key: tensor.clone() for key, tensor in to.state_dict().items()}
    loads: tuple[Any, ...] = (second.load_state_dict, to.load_state_dict)
    for load, state in zip(loads, (model.state_dict(), adapter.state_dict()), strict=True):
        with pytest.raises(lf.LorafoldError, match=f"adapter with other options: found {told}"):
            load(state)
        with pytest.raises(lf.LorafoldError, match="of an adapter with other options"):
            load(state, **({"strict": False} if load is second.load_state_dict else {}))
    assert all(torch.equal(t, before[key]) for key, t in to.state_dict().items())


def test_a_state_of_an_earlier_version_and_another_dropout_load(tiny_model) -> None:
    model, second = tiny_model("llama"), tiny_model("llama")
    adapter = moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.1)))
    to = lf.attach(second, lf.LoRA(rank=4, dropout=0.0))
    second.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(second))
    for state, load in ((model.state_dict(), second.load_state_dict),
                        (adapter.state_dict(), to.load_state_dict)):  # fmt: skip
        load({key: tensor for key, tensor in state.items() if not key.endswith(".settings")})
    assert torch.equal(logits(model), logits(second))


def test_a_state_of_an_adapter_by_another_name_is_unexpected(tiny_model) -> None:
    model, second = tiny_model("llama"), tiny_model("llama")
    lf.attach(model, lf.LoRA(rank=4), name="one")
    lf.attach(second, lf.LoRA(rank=4), name="two")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict.*deltas\.one\.A"):
        second.load_state_dict(model.state_dict())


def test_rows_of_other_tokens_are_refused(tiny_model) -> None:
    model, second = tiny_model("llama"), tiny_model("llama")
    lf.attach(model, lf.LoRA(rank=4), tokens=[5, 6])
    lf.attach(second, lf.LoRA(rank=4), tokens=[5, 7])
    with pytest.raises(lf.LorafoldError, match=r"ids \[5, 6\], expected \[5, 7\]"):
        second.load_state_dict(model.state_dict())
