"""Experts of the classes in `core.matrices`: both ways with PEFT, trained and merged."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import lorafold as lf
from adapter_files import assert_same_tensors, json_of
from conftest import make_tokenizer
from lorafold.core.spec import Spec
from mixtures import FORMS, mixture
from peft_cases import CLOSE

pytestmark = pytest.mark.usefixtures("unestimated")

IDS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"prompt": f"Copy {i}", "completion": f"{i} is {i}"} for i in range(8)]
# PEFT's names of the parameters; for those of two dimensions it has no form
PARAMETERS = {
    "llama4": ["experts.gate_up_proj", "experts.down_proj"],
    "longcat": ["experts.gate_up_proj", "experts.down_proj"],
    "jetmoe": ["input_linear.weight", "output_linear.weight"],
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@torch.no_grad()
def moved(model: Any, marks: str = "") -> torch.Tensor:
    """The logits with other values of the parameters whose names have the marks."""
    for name, p in model.named_parameters():
        if marks in name:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return logits(model)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= CLOSE * expected.abs().max())


@pytest.mark.parametrize("spec", [lf.LoRA(rank=3, dropout=0.0), lf.PiSSA(rank=3)], ids=type)
@pytest.mark.parametrize("name", FORMS)
def test_peft_reads_ours(name: str, spec: Spec, tmp_path: Path) -> None:
    base = mixture(name)
    model = deepcopy(base)
    adapter = lf.attach(model, spec)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    expected, bare = logits(model), logits(base)
    assert not near(bare, expected)
    adapter.save(tmp_path / "a")
    again = deepcopy(base)
    lf.load(again, tmp_path / "a")
    assert torch.equal(logits(again), expected)
    if name in PARAMETERS:
        assert near(logits(peft.PeftModel.from_pretrained(base, tmp_path / "a")), expected)
    else:
        assert json_of(tmp_path / "a")["peft_type"] == "LORAFOLD_EXPERTS_LORA"
        with pytest.raises(KeyError, match="LORAFOLD_EXPERTS_LORA"):
            peft.PeftModel.from_pretrained(base, tmp_path / "a")


@pytest.mark.parametrize("name", PARAMETERS)
def test_ours_reads_peft(name: str, tmp_path: Path) -> None:
    base = mixture(name)
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=PARAMETERS[name])
    theirs = peft.get_peft_model(deepcopy(base), config)
    expected = moved(theirs, "lora_")
    theirs.save_pretrained(tmp_path / "theirs")
    lf.load(base, tmp_path / "theirs").save(tmp_path / "ours")
    assert near(logits(base), expected)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_what_peft_takes_for_one_matrix_is_refused(tmp_path: Path) -> None:
    base = mixture("dbrx")
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["mlp.w1"])
    peft.get_peft_model(deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    expected = "target_parameters: found .*0.ffn.experts.mlp.w1, .*, expected .* three dimensions"
    with pytest.raises(lf.LorafoldError, match=expected):
        lf.load(base, tmp_path / "theirs")


@pytest.mark.few(3)
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", FORMS)
def test_trained_then_merged_is_adapted(name: str, storage: str, tmp_path: Path) -> None:
    model, tokenizer, base = mixture(name), make_tokenizer(), tmp_path / "base"
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = lf.Recipe(epochs=2, batch=4, storage=storage, rank=2, lr=1e-2)
    lf.train(recipe, data=ROWS, out=tmp_path / "a", model=str(base))
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"text": "Row 1 of a few"}) + "\n")
    result = lf.merge(base, tmp_path / "a", out=tmp_path / "merged", probe=probe)
    assert result.gap is not None
    assert result.gap.kl < (1e-8 if storage == "fp32" else 1e-2)  # bitsandbytes rounds products
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    bare = logits(model)
    assert not near(logits(merged.eval()), bare)
    if storage == "fp32":
        lf.load(model, tmp_path / "a")
        assert near(logits(merged), logits(model))
