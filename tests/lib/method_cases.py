"""The methods of the table on whole tiny models: with which options, attached, moved."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import nn

import lorafold as lf
from lorafold.core.spec import Spec
from lorafold.methods import METHODS

OPTIONS = {
    "lt-sft": {"density": 0.05},
    "fish": {"density": 0.05},
    "houlsby": {"size": 6},
    "pfeiffer": {"size": 6},
    "prompt": {"tokens": 4},
    "prefix": {"tokens": 4},
    "lokr": {"rank": 2},
    "vera": {"rank": 8},
}
NO_IDENTITY = {"prompt", "prefix"}
IDS = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(4))


def classifier(kind: str) -> Any:
    """A tiny llama or gpt2 of three classes."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260,
        "num_labels": 3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = tf.GPT2Config if kind == "gpt2" else partial(tf.LlamaConfig, intermediate_size=48)
    return tf.AutoModelForSequenceClassification.from_config(config(**sizes)).eval()


def spec_of(method: str) -> Spec:
    options = OPTIONS.get(
        method,
        (
            {"rank": 3}
            if method in ("lora", "rslora", "pissa", "olora", "dora", "adalora", "loha")
            else {}
        ),
    )
    spec = (
        METHODS[method](**options)
        if method != "dora"
        else METHODS[method](lf.LoRA(rank=3, dropout=0.0))
    )
    return METHODS[method](**options, dropout=0.0) if hasattr(spec, "dropout") else spec


def attached(model: nn.Module, method: str) -> lf.Adapter:
    torch.manual_seed(0)
    return lf.attach(model, spec_of(method))


def moved(adapter: lf.Adapter, size: float = 0.05) -> lf.Adapter:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return adapter
