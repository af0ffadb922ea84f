"""Configurations to estimate, and an estimate held against what a step takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

from lorafold.memory.estimate import estimate
from lorafold.memory.measure import measure
from lorafold.memory.trace import MemorySetting
from lorafold.methods import make_spec
from lorafold.models.fake import fake_model
from lorafold.models.quantizations import Storage
from lorafold.ops.arithmetic import widens

COMMON = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": tf.LlamaConfig(**COMMON),
    "qwen2": tf.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "gemma2": tf.Gemma2Config(**COMMON, head_dim=32, sliding_window=32),
    "bert": tf.BertConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=500,
    ),
    "mamba": tf.MambaConfig(hidden_size=128, num_hidden_layers=6, vocab_size=500, pad_token_id=0),
    "gpt2": tf.GPT2Config(n_embd=128, n_layer=6, n_head=4, vocab_size=500),
}
BF16 = Storage(torch.bfloat16)
LORA = MemorySetting(BF16, make_spec("lora"), rows=(128, 128))
CPU = torch.device("cpu")


def close(config: Any, setting: MemorySetting) -> dict[str, int]:
    """The terms of an estimate that is what a step takes. 16-bit matrices are multiplied as this
    processor does, or as a scope says.
    """
    setting = replace(setting, widened=widens(setting.base.dtype))
    found, blocks = estimate(config, setting), config.get_text_config().num_hidden_layers
    measured = measure(
        lambda: fake_model(config, setting.base, blocks, setting.classes), setting, CPU
    )
    assert found.total == pytest.approx(measured, rel=0.05)
    assert min(found.terms.values()) >= 0
    return found.terms
