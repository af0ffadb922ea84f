"""Settings by the names that people give them: the modes of holding a model, and Llama's sizes.

    inference    no training; 16 bits unless the base is said
    full         every weight trained, in fp32 unless the base is said: 16 bytes a parameter with
                 gradients and AdamW's moments
    lora         LoRA over a base in bf16
    qlora        LoRA over a base in NF4
    any other    a method by its name, over the recipe's own base

`--params 7b, 13b, 70b` are Llama 2's shapes (Touvron et al. 2023, arXiv 2307.09288), `65b` and
`33b` Llama's (arXiv 2302.13971, table 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorafold.errors import LorafoldError
from lorafold.memory.trace import Setting
from lorafold.models.quantizing import QUANTIZATIONS
from lorafold.models.storage import Storage
from lorafold.step.adamw import check_rounding
from lorafold.step.fitting import spec_of, trainable_storage
from lorafold.step.recipe import OF_MEMORY, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODES: dict[str, dict[str, Any]] = {
    "inference": {"base": "bf16"},
    "full": {"method": "full"},
    "lora": {"method": "lora", "base": "bf16"},
    "qlora": {"method": "lora", "base": "nf4"},
}


def setting_of(
    mode: str, recipe: Recipe, batch: int, length: int, labelled: int | None = None
) -> Setting:
    """The setting that a mode and a recipe ask for; what the recipe sets itself goes over the mode.

    LorafoldError for an unknown mode, for fields of the recipe that an estimate does not read, for
    more labels than there are tokens, and for an optimizer that would lose a method's updates.
    """
    if unread := sorted(recipe.model_fields_set - OF_MEMORY):
        raise LorafoldError(
            f"estimate: {', '.join(unread)}: not taken into account; expected fields among"
            f" {', '.join(sorted(OF_MEMORY))}"
        )
    if labelled is not None and labelled > batch * (length - 1):
        raise LorafoldError(
            f"--labelled {labelled}: expected at most {batch * (length - 1)}, for {batch} rows of"
            f" {length} tokens"
        )
    fields = MODES.get(mode, {"method": mode})
    recipe = Recipe(**(fields | recipe.model_dump(exclude_unset=True)))
    if mode == "inference":
        return Setting(stored(recipe.base), rows=(length,) * batch)
    optimizer = "adamw" if recipe.optimizer == "auto" else recipe.optimizer
    spec = spec_of(recipe)
    base = stored(trainable_storage(recipe) if spec.trains_base else recipe.base)
    if spec.trains_base:
        check_rounding(optimizer, [base.dtype])
    return Setting(
        base,
        spec,
        recipe.targets,
        rows=(length,) * batch,
        labelled=labelled,
        optimizer=optimizer,
        checkpointing=recipe.gradient_checkpointing is True,
    )


def stored(base: str) -> Storage:
    """The storage of that word; packed weights are computed with in bf16, and auto is bf16."""
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    return Storage(dtype, base if base in QUANTIZATIONS else None)


LLAMA = {  # width, of the MLP, blocks, heads, key heads, context
    "7b": (4096, 11008, 32, 32, 32, 4096),
    "13b": (5120, 13824, 40, 40, 40, 4096),
    "33b": (6656, 17920, 60, 52, 52, 2048),
    "65b": (8192, 22016, 80, 64, 64, 2048),
    "70b": (8192, 28672, 80, 64, 8, 4096),
}


def llama(size: str) -> PreTrainedConfig:
    """The configuration of the Llama of that size. LorafoldError for another word."""
    from transformers import LlamaConfig

    if size.lower() not in LLAMA:
        raise LorafoldError(f"params {size}: expected one of {', '.join(LLAMA)}")
    width, mlp, blocks, heads, key_heads, context = LLAMA[size.lower()]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=context,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
