"""Adapters of a multimodal model's text part, read by PEFT on the class that config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from adapter_files import change, configure, json_of, tensors_of
from conftest import make_tokenizer
from lorafold.models.loading import load_model
from more_architectures import FAMILIES
from peft_cases import gap, load_theirs, logits, moved

WHOLE = ("qwen3.5", "qwen3.5-moe", "mllama")  # mllama's tower has q_proj and others of the text's


def written(name: str, path: Path) -> Path:
    FAMILIES[name].model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.few(2)
@pytest.mark.parametrize("name", WHOLE)
def test_peft_reads_the_adapter_on_the_class_of_the_configuration(name: str, tmp_path) -> None:
    """PEFT found no key of it there, and computed the bare model."""
    cls, base = FAMILIES[name].cls, written(name, tmp_path / "base")
    model = load_model(base, torch.float32)
    assert type(model) is not cls
    spec = lf.LoRA(rank=2, dropout=0.0)
    moved(model, spec, modules_to_save=["lm_head"]).save(tmp_path / "adapter")
    theirs = load_theirs(cls.from_pretrained(base), tmp_path / "adapter")
    assert gap(logits(theirs), logits(model)) < 1e-5
    for again in (load_model(base, torch.float32), cls.from_pretrained(base)):
        lf.load(again, tmp_path / "adapter")
        assert gap(logits(again), logits(model)) < 1e-6
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoModelForMultimodalLM.from_pretrained" in card


def test_adapters_of_earlier_versions_and_of_peft_are_read(tmp_path: Path) -> None:
    """Earlier ones have the module paths of the part; PEFT has regular expressions too."""
    base, old = written("mllama", tmp_path / "base"), tmp_path / "adapter"
    model = load_model(base, torch.float32)
    moved(model, lf.LoRA(rank=2, dropout=0.0), ["q_proj"]).save(old)
    whole = "model.language_model."
    state, targets = tensors_of(old), json_of(old)["target_modules"]
    assert all(whole in key for key in state)
    assert all(target.startswith(whole) for target in targets)

    def read() -> Any:
        again = load_model(base, torch.float32)
        lf.load(again, old)
        return again

    configure(old, target_modules=r"model\.language_model\.layers\.\d+\.\w+_attn\.q_proj")
    assert torch.equal(logits(read()), logits(model))
    for key in state:
        change(old, lambda t, key=key: t.update({key.replace(whole, "model."): t.pop(key)}))
    configure(old, target_modules=[target.replace(whole, "model.") for target in targets])
    assert torch.equal(logits(read()), logits(model))


@pytest.mark.slow
def test_it_is_trained_and_merged(tmp_path: Path) -> None:
    base = written("qwen3.5", tmp_path / "base")
    rows = [{"prompt": "a", "completion": " fox"}]
    recipe = lf.Recipe(steps=1, batch=1, storage="fp32", lr=0.1)
    lf.train(recipe, model=base, data=rows, out=tmp_path / "adapter")
    more = recipe.model_copy(update={"steps": 2})
    lf.train(more, model=base, data=rows, out=tmp_path / "over", over=tmp_path / "adapter")
    model = load_model(base, torch.float32)
    lf.load(model, tmp_path / "adapter")
    lf.merge(base, tmp_path / "adapter", tmp_path / "merged", storage="fp32")
    merged = load_model(tmp_path / "merged", torch.float32)
    assert gap(logits(merged), logits(model)) < 1e-5
