"""How a model is set while an engine has it, in contexts that set it back.

`rows_apart`: bitsandbytes' int8 matmul chooses which inputs stay in 16 bits from all rows of a
batch (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339, section 3.2). The engine multiplies by the
dequantized matrix instead, as training does under adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lorafold.bases import layer_of
from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import Adapted
from lorafold.errors import LorafoldError


@contextmanager
def rows_apart(model: nn.Module) -> Iterator[None]:
    """Have every module of the model compute each row of its input apart, until the `with` block
    ends.
    """
    with ExitStack() as stack:
        for _, module in Anatomy.of(model).modules:
            layer: Any = layer_of(module)
            apart = isinstance(module, Adapted)  # its own forward is that of the layer
            if layer.mixes_rows and not apart and "forward" not in vars(module):
                module.forward = layer
                stack.callback(vars(module).pop, "forward", None)
        yield


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
