"""Models without values: every module, parameter and packed matrix in its shape and dtype, and no
memory behind them.

    with without_values():
        model = fake_model(config, Storage(torch.bfloat16, "nf4"), blocks=2)

It is transformers' own class, so that whatever runs on a model runs on its fake_model; the numbers
alone are missing (`core.fake`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import FakeTensorMode

from lorafold.bases import layer_of
from lorafold.bases.bitsandbytes import PACKERS
from lorafold.models.load_errors import loading
from lorafold.models.quantizing import packable
from lorafold.models.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def without_values() -> AbstractContextManager[Any]:
    """Tensors that are made within have no values, and what is computed of them has none."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def shortened(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """The same architecture with fewer blocks: the first ones."""
    short = deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = blocks
    # some configurations work it out from the number of blocks
    if kinds := vars(text).get("layer_types"):
        text.layer_types = [kinds[i % len(kinds)] for i in range(blocks)]
    return short


def period(config: PreTrainedConfig) -> int:
    """After how many blocks their kinds repeat: 1 where all are of a kind, 2 where windows and
    whole attention take turns.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or [""]
    return next(
        n
        for n in range(1, len(kinds) + 1)
        if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
    )


def fake_model(
    config: PreTrainedConfig, storage: Storage, blocks: int, classes: int = 0
) -> PreTrainedModel:
    """The causal language model, or the classifier of so many classes, its first blocks, held as
    `storage` says; frozen. Where there are values it has random ones.

    LorafoldError where transformers has no such model.
    """
    import transformers as tf

    short = shortened(config, blocks)
    if classes:
        text = short.get_text_config()
        short.num_labels, text.pad_token_id, text.use_cache = classes, 0, False
    auto = tf.AutoModelForSequenceClassification if classes else tf.AutoModelForCausalLM
    with loading(f"configuration of a {config.model_type}"):
        model = auto.from_config(short, dtype=storage.dtype).requires_grad_(False)
    if storage.quantization is not None:
        for path in packable(model):
            parent, _, name = path.rpartition(".")
            w, b = layer_of(model.get_submodule(path)).dense()
            packed = PACKERS[storage.quantization](w)
            packed.bias = b  # type: ignore[assignment]
            setattr(model.get_submodule(parent), name, packed)
    return model
