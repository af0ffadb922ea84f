"""How a model is set while an engine has it, in contexts that set it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """A model none of whose parameters asks for gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def greedy(model: Any) -> Iterator[None]:
    """A model whose `generate` is greedy and ends nowhere."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own
