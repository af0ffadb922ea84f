"""Models without values: every module, parameter and packed matrix in its shape and dtype, and no memory behind them.

    with no_values():
        model = skeleton(config, Storage(torch.bfloat16, "nf4"), blocks=2)

It is transformers' own class, so that whatever runs on a model runs on its skeleton; the numbers alone are missing (`core.valueless`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import FakeTensorMode

from lorafold.bases.foreign import PACKERS
from lorafold.io.models import Storage
from lorafold.io.quantized import packable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def no_values() -> AbstractContextManager[Any]:
    """Tensors that are made within have no values, and what is computed of them has none."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def shortened(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """The same architecture with fewer blocks: the first ones."""
    short = deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:blocks]
    return short


def skeleton(config: PreTrainedConfig, storage: Storage, blocks: int) -> PreTrainedModel:
    """The causal language model, its first so many blocks, held as `storage` says. Call it where there are `no_values`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(shortened(config, blocks), dtype=storage.dtype).requires_grad_(False)
    if storage.quantization is not None:
        for path in packable(model):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PACKERS[storage.quantization](model.get_submodule(path).weight))
    return model
