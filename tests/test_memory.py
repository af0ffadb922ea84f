"""Estimates against what a real step holds, counted at the allocator; nothing of an estimate knows a method or a storage."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

import lorafold as lf
from lorafold.io.models import Storage
from lorafold.memory.measure import living, peak_of
from lorafold.memory.model import estimate
from lorafold.memory.trace import Setting
from lorafold.methods import make_spec
from lorafold.train.activations import recompute
from lorafold.train.adamw import make_optimizer
from lorafold.train.data import Example
from lorafold.train.fused import fused
from lorafold.train.objectives import Sft
from lorafold.train.recipe import Recipe

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=320, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=500
)  # fmt: skip


class Tokenizer:
    pad_token_id = 0


def held(setting: Setting) -> int:
    before = living()
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=setting.base.dtype)
    assert setting.spec is not None
    lf.attach(model, setting.spec)
    if setting.checkpointing:
        recompute(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", [{"params": trained, "lr": 1e-4}], Recipe())
    rows = torch.randint(5, 400, (setting.batch, setting.length)).tolist()
    with fused(model), Sft().loss(model, Tokenizer(), True, Console(quiet=True)) as loss:  # type: ignore[arg-type]
        inputs = loss.collate([Example(tuple(row), tuple(row)) for row in rows], torch.device("cpu"))
        loss.train()

        def step() -> None:
            loss(**inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return peak_of(step, torch.device("cpu")) - before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "loha", "lokr", "ia3", "bitfit", "full"])
def test_estimates_are_what_is_held(method: str, checkpointing: bool) -> None:
    base = Storage(torch.float32 if method == "full" else torch.bfloat16)
    setting = Setting(base, make_spec(method), batch=2, length=128, checkpointing=checkpointing)
    found = estimate(CONFIG, setting)
    assert found.total == pytest.approx(held(setting), rel=0.05)
    assert min(found.terms.values()) >= 0
