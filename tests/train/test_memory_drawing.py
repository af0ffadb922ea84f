"""What the memory of a run says of the engine that draws is what the engine takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from conftest import make_tokenizer
from lorafold.engine.fast_path import Packed
from lorafold.engine.runner import SlotRunner
from lorafold.evaluation.rollouts import Drawn, Rollouts
from lorafold.memory.measure import allocated, peak_of
from lorafold.memory.terms import estimate
from lorafold.memory.trace import Setting, trace
from lorafold.models.fake import fake_model
from lorafold.models.storage import Storage
from memory_cases import COMMON, CPU

CONFIG = tf.LlamaConfig(**COMMON)
DRAWN = Drawn(slots=24, group=12, prompt=20, longest=40)


def setting(dtype: torch.dtype, drawn: Drawn | None = DRAWN, **changes: Any) -> Setting:
    return Setting(Storage(dtype), lf.LoRA(rank=8, dropout=0.0), rows=(16,), draws=drawn, **changes)


def cached(rollouts: Rollouts) -> int:
    runner = rollouts.engine._runner
    assert isinstance(runner, SlotRunner)
    return runner.cache.nbytes


def opaque(rollouts: Rollouts) -> int:
    """The bytes of matrices in oneDNN's order, which have no storage."""
    forwards = [vars(module).get("forward") for module in rollouts.shell.modules()]
    packed = {f.func for f in forwards if isinstance(f, partial) and isinstance(f.func, Packed)}
    return sum(one._w.numel() * one._w.element_size() for one in packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_the_engine_and_of_its_keys_and_values(dtype: torch.dtype) -> None:
    asked = setting(dtype)
    expected = trace(CONFIG, asked, CONFIG.num_hidden_layers)
    model = fake_model(CONFIG, asked.base, CONFIG.num_hidden_layers)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    lf.attach(model, asked.spec)
    before = allocated(CPU)
    rollouts = Rollouts(model, make_tokenizer(), group=12, longest=DRAWN.longest)
    rollouts.open(DRAWN.prompt, DRAWN.slots)
    prompts = [[*range(5, 5 + DRAWN.prompt)]] * 2
    held = []
    rollouts.draw(prompts, 0, progress=lambda *_: held.append(cached(rollouts)))
    engine = allocated(CPU) - before + opaque(rollouts)
    assert max(held) == expected.slots
    assert engine == pytest.approx(expected.engine, rel=0.05)
    if dtype == torch.float32:  # no ledger sees matrices without a storage
        peak = peak_of(lambda: rollouts.draw(prompts, 1), CPU) - before - engine
        assert peak == pytest.approx(expected.drawing, rel=0.1)
    rollouts.close()


def test_the_peak_is_that_of_the_step_or_of_drawing() -> None:
    without = estimate(CONFIG, setting(torch.float32, None)).terms
    short = estimate(CONFIG, setting(torch.float32, Drawn(1, 1, 4, 4))).terms
    long = estimate(CONFIG, setting(torch.float32, Drawn(64, 8, 20, 2000))).terms
    assert without["engine"] == 0 < short["engine"]
    assert {**short, "engine": 0} == without
    assert long["kv_cache"] == 64 * 2048 * 2 * 6 * 2 * 32 * 4
    assert long["activations"] == long["gradients"] == long["logits"] == 0
