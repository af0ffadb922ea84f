"""What the memory of a run says of the engine that draws is what the engine takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from conftest import make_tokenizer
from lorafold.data.batches import StoredFeed
from lorafold.data.prompts import TokenizedPrompt
from lorafold.data.row_store import SourcePart
from lorafold.engine.fast_path import Packed
from lorafold.engine.runner import SlotRunner
from lorafold.evaluation.rollouts import Rollouts, RolloutSize
from lorafold.memory.estimate import estimate
from lorafold.memory.measure import allocated, peak_of
from lorafold.memory.preflight import documents, largest_batch
from lorafold.memory.trace import Setting, trace
from lorafold.models.fake import fake_model
from lorafold.models.quantizations import Storage
from lorafold.objectives.options import SamplingOptions
from lorafold.objectives.policy import PolicyObjective
from lorafold.recipe.recipe import Recipe
from lorafold.training_step.policy_algorithms import Grpo
from memory_cases import COMMON, CPU

CONFIG = tf.LlamaConfig(**{**COMMON, "num_hidden_layers": 2})
DRAWN = RolloutSize(slots=24, group=12, prompt=20, longest=40)


def setting(dtype: torch.dtype, drawn: RolloutSize | None = DRAWN, **changes: Any) -> Setting:
    return Setting(Storage(dtype), lf.LoRA(rank=8, dropout=0.0), rows=(16,), draws=drawn, **changes)


def cached(rollouts: Rollouts) -> int:
    runner = rollouts.engine._runner
    assert isinstance(runner, SlotRunner)
    buffers = (*runner.cache.keys.values(), *runner.cache.values.values())
    return sum(buffer.nbytes for buffer in buffers)


def opaque(rollouts: Rollouts) -> int:
    """The bytes of matrices in oneDNN's order, which have no storage."""
    forwards = [vars(module).get("forward") for module in rollouts.shell.modules()]
    packed = {f.func for f in forwards if isinstance(f, partial) and isinstance(f.func, Packed)}
    return sum(one._w.numel() * one._w.element_size() for one in packed)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
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
    long = estimate(CONFIG, setting(torch.float32, RolloutSize(64, 8, 20, 2000))).terms
    assert without["engine"] == without["kv_cache"] == 0 < without["activations"]
    assert long["kv_cache"] == 64 * 2048 * 2 * 2 * 2 * 32 * 4
    assert long["activations"] == long["gradients"] == long["logits"] == 0


def test_shorter_completions_fill_a_sequence() -> None:
    """Planned are those that are as long as they may be, of which fewer fit."""
    drawing = PolicyObjective(Grpo(), SamplingOptions(group=4, max_new_tokens=20))
    prompts = [TokenizedPrompt((1,) * n, {}, "") for n in (10, 12, 14)]
    feed = StoredFeed(prompts, [SourcePart(3)], 3, 1, 0)
    found = [
        largest_batch(recipe, feed, drawing, setting(torch.float32, None))
        for recipe in (Recipe(batch=3, steps=1, max_length=n) for n in (150, 1000))
    ]
    whole = sum(n for prompt in prompts for n in documents([drawing.trained(prompt)]))
    assert [sum(one.rows) for one in found] == [150, whole]
    assert [one.draws for one in found] == [RolloutSize(12, 4, 14, 20)] * 2
