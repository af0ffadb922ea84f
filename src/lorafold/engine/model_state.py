"""How a model is set while an engine has it, in contexts that set it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorafold.errors import LorafoldError

TAKEN = "lorafold_engine"  # the attribute of a model


@contextmanager
def taken(model: nn.Module) -> Iterator[None]:
    """A model that no other engine has. Raises LorafoldError if one does."""
    if TAKEN in vars(model):
        raise LorafoldError(
            "engine: found another one that has this model, expected that to be closed, or its"
            " completion to be read to the end"
        )
    vars(model)[TAKEN] = True
    try:
        yield
    finally:
        del vars(model)[TAKEN]


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
