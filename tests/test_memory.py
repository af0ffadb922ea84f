"""Estimates against what a real step holds, counted at the allocator, over architectures, methods and storages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from rich.console import Console

import lorafold as lf
from lorafold.bases.foreign import PACKERS
from lorafold.cli.estimate import size, verdict
from lorafold.errors import LorafoldError
from lorafold.io.models import Storage
from lorafold.io.quantized import packable
from lorafold.memory.advice import advise
from lorafold.memory.measure import living, peak_of
from lorafold.memory.model import estimate
from lorafold.memory.modes import setting_of
from lorafold.memory.shapes import llama
from lorafold.memory.skeleton import period
from lorafold.memory.trace import Setting
from lorafold.methods import make_spec
from lorafold.train.activations import recompute
from lorafold.train.adamw import make_optimizer
from lorafold.train.data import Example
from lorafold.train.fused import fused
from lorafold.train.objectives import Sft
from lorafold.train.recipe import Recipe

COMMON = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 500, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": tf.LlamaConfig(**COMMON),
    "qwen2": tf.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "gemma2": tf.Gemma2Config(**COMMON, head_dim=32, sliding_window=32),
    "gpt2": tf.GPT2Config(n_embd=128, n_layer=6, n_head=4, vocab_size=500),
}
BF16 = Storage(torch.bfloat16)
LORA = Setting(BF16, make_spec("lora"), batch=2, length=128)
CPU = torch.device("cpu")


class Tokenizer:
    pad_token_id = 0


def real(config: Any, base: Storage) -> Any:
    model = tf.AutoModelForCausalLM.from_config(config, dtype=base.dtype).requires_grad_(False)
    for path in packable(model) if base.quantization else ():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, PACKERS[str(base.quantization)](model.get_submodule(path).weight))
    return model


def held(config: Any, setting: Setting) -> int:
    """The peak of the second step, or of a prompt and the token after it."""
    before = living()
    model = real(config, setting.base)
    if setting.spec is None:
        return peak_of(lambda: answer(model.eval(), setting), CPU) - before
    lf.attach(model, setting.spec)
    if setting.checkpointing:
        recompute(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(setting.optimizer, [{"params": trained, "lr": 1e-4}], Recipe())
    rows = torch.randint(5, 400, (setting.batch, setting.length)).tolist()
    with fused(model), Sft().loss(model, Tokenizer(), True, Console(quiet=True)) as loss:  # type: ignore[arg-type]
        inputs = loss.collate([Example(tuple(row), tuple(row)) for row in rows], CPU)
        loss.train()

        def step() -> None:
            for _ in range(1 + setting.accumulating):
                loss(**inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return peak_of(step, CPU) - before


@torch.no_grad()
def answer(model: Any, setting: Setting) -> None:
    ids = torch.ones(setting.batch, setting.length, dtype=torch.long)
    cache = model(input_ids=ids[:, 1:], use_cache=True, logits_to_keep=1).cache
    model(input_ids=ids[:, :1], cache=cache, use_cache=True)


def close(config: Any, setting: Setting) -> None:
    found = estimate(config, setting)
    assert found.total == pytest.approx(held(config, setting), rel=0.05)
    assert min(found.terms.values()) >= 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora", "loha", "lokr", "ia3", "bitfit", "houlsby", "prefix", "full"])
def test_methods(method: str, checkpointing: bool) -> None:
    base = Storage(torch.float32) if method == "full" else BF16
    close(CONFIGS["llama"], replace(LORA, base=base, spec=make_spec(method), checkpointing=checkpointing))


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name: str) -> None:
    assert period(CONFIGS[name]) == (2 if name == "gemma2" else 1)
    close(CONFIGS[name], LORA)


@pytest.mark.parametrize("method", ["lora", "loha"])
@pytest.mark.parametrize("quantization", PACKERS)
def test_storages(quantization: str, method: str) -> None:
    close(CONFIGS["llama"], replace(LORA, base=Storage(torch.bfloat16, quantization), spec=make_spec(method)))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_that_are_there_already(method: str) -> None:
    close(CONFIGS["llama"], replace(LORA, base=Storage(torch.float32), spec=make_spec(method), accumulating=True))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_inference(name: str) -> None:
    close(CONFIGS[name], Setting(BF16, batch=2, length=200))
    assert estimate(CONFIGS[name], Setting(BF16, batch=2, length=200)).terms["kv_cache"] == 2 * 6 * 2 * 32 * 200 * 2 * 2


def test_what_is_advised_fits() -> None:
    config, setting = CONFIGS["llama"], replace(LORA, batch=8)
    memory = estimate(config, replace(LORA, batch=4)).total + 1000
    found = advise(config, setting, memory)
    assert (found.fits, found.batch) == (False, 4)
    assert found.length < setting.length
    assert estimate(config, replace(setting, length=found.length)).total <= memory
    words = dict(found.changes)
    assert words["gradient checkpointing"] == estimate(config, replace(setting, checkpointing=True)).total
    assert max(words.values()) <= memory
    assert {"batch 4", f"length {found.length}"} <= set(words)
    assert verdict(found, setting)[0].startswith("does not fit: ")
    assert any(line.startswith("would fit with gradient checkpointing: ") for line in verdict(found, setting))
    assert advise(config, replace(LORA, length=64), memory).fits


def test_a_model_that_no_machine_here_holds() -> None:
    terms = estimate(llama("70b"), Setting(BF16, batch=1, length=64)).terms
    parameters = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 2 * 32000 * 8192 + 8192
    assert terms["weights"] == pytest.approx(2 * parameters, rel=1e-6)
    assert terms["kv_cache"] == 2 * 80 * 8 * 128 * 64 * 2


@pytest.mark.parametrize(
    ("mode", "fields", "message"),
    [
        ("nosuch", {}, "unknown method 'nosuch'"),
        ("lora", {"lr": 1e-3}, "lr: not taken into account"),
        ("full", {"base": "nf4"}, "full trains the base's own weights"),
    ],
)
def test_what_can_not_be_asked(mode: str, fields: dict, message: str) -> None:
    with pytest.raises(LorafoldError, match=message):
        setting_of(mode, Recipe(**fields), 1, 64)


def test_labels_are_no_more_than_there_are() -> None:
    with pytest.raises(LorafoldError, match="expected at most 126"):
        setting_of("lora", Recipe(), 2, 64, labelled=127)


def test_a_method_that_asks_for_values_is_refused() -> None:
    with pytest.raises(LorafoldError, match="Prompt: can't be estimated"):
        estimate(CONFIGS["llama"], replace(LORA, spec=make_spec("prompt")))


def test_sizes() -> None:
    assert [size(text) for text in ("24GB", "24 gib", "500MB", "1.5T", "7")] == [24 * 10**9, 24 * 2**30, 5 * 10**8, 15 * 10**11, 7]
    with pytest.raises(LorafoldError, match="expected a size"):
        size("lots")
