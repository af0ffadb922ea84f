"""Adapters of a language model that transformers loads alone out of a model with towers, read by
PEFT on the class that config.json names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import lorafold as lf
from conftest import make_tokenizer
from lorafold.files.atomic import MANIFEST
from lorafold.models.loading import load_model
from peft_cases import gap, load_theirs, logits, move

TEXT: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN: dict[str, Any] = TEXT | {
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
SEEN: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
    "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}  # fmt: skip
# its tower has q_proj and others of the language model's names
MLLAMA_SEEN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1,
    "attention_heads": 4, "image_size": 8, "patch_size": 4, "vision_output_dim": 64,
    "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip
WHOLE: dict[str, tuple[Any, Callable[[], Any]]] = {
    "qwen3.5": (
        tf.Qwen3_5ForConditionalGeneration,
        lambda: tf.Qwen3_5Config(text_config=QWEN, vision_config=SEEN),
    ),
    "qwen3.5-moe": (
        tf.Qwen3_5MoeForConditionalGeneration,
        lambda: tf.Qwen3_5MoeConfig(text_config=QWEN | EXPERTS, vision_config=SEEN),
    ),
    "mllama": (
        tf.MllamaForConditionalGeneration,
        lambda: tf.MllamaConfig(
            text_config=TEXT | {"cross_attention_layers": [1]}, vision_config=MLLAMA_SEEN
        ),
    ),
}


def written(name: str, path: Path) -> Path:
    cls, config = WHOLE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.few(2)
@pytest.mark.parametrize("name", WHOLE)
def test_peft_reads_the_adapter_on_the_class_of_the_configuration(
    name: str, tmp_path: Path
) -> None:
    """PEFT found no key of it there, and computed the bare model."""
    cls, base = WHOLE[name][0], written(name, tmp_path / "base")
    model = load_model(base, torch.float32)
    assert type(model) is not cls
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0), modules_to_save=["lm_head"])
    move(adapter.parameters())
    adapter.save(tmp_path / "adapter")
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
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0), ["q_proj"])
    move(adapter.parameters())
    adapter.save(old)
    whole = "model.language_model."
    state = load_file(old / "adapter_model.safetensors")
    assert all(whole in key for key in state)
    config = json.loads((old / "adapter_config.json").read_text())
    assert all(target.startswith(whole) for target in config["target_modules"])
    (old / MANIFEST).unlink()
    targets = r"model\.language_model\.layers\.\d+\.\w+_attn\.q_proj"
    (old / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    again = load_model(base, torch.float32)
    lf.load(again, old)
    assert torch.equal(logits(again), logits(model))
    parts = {key.replace(whole, "model."): tensor for key, tensor in state.items()}
    save_file(parts, old / "adapter_model.safetensors")
    targets = [target.replace(whole, "model.") for target in config["target_modules"]]
    (old / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    again = load_model(base, torch.float32)
    lf.load(again, old)
    assert torch.equal(logits(again), logits(model))


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
