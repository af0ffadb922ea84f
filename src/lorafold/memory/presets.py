"""Settings by name: the ways to use a model (modes), and the shapes of Llama 2 (7b, 13b, 70b;
Touvron et al. 2023, arXiv 2307.09288) and Llama (33b, 65b; arXiv 2302.13971, table 2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lorafold.errors import LorafoldError
from lorafold.memory.trace import MemorySetting
from lorafold.models.quantizations import DEFAULT, IN_FILES, QUANTIZED, Storage
from lorafold.models.quantize_on_load import quantization_of
from lorafold.recipe.fields import MEMORY_FIELDS, ROW_FIELDS
from lorafold.recipe.recipe import Recipe
from lorafold.recipe.resolve_settings import spec_of, trainable_storage
from lorafold.training_step.optimizers import check_rounding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODES: dict[str, dict[str, Any]] = {
    "inference": {"storage": "bf16"},
    "full": {"method": "full"},
    "lora": {"method": "lora", "storage": "bf16"},
    "qlora": {"method": "lora", "storage": DEFAULT},
}


def memory_setting(
    mode: str, recipe: Recipe, batch: int, length: int, labelled: int | None = None
) -> MemorySetting:
    """The setting for a mode and a recipe, whose fields override the mode's."""
    check_fields(recipe, MEMORY_FIELDS)
    if labelled is not None and labelled > batch * (length - 1):
        raise LorafoldError(
            f"--labelled {labelled}: expected at most {batch * (length - 1)}, the number of"
            f" tokens that {batch} rows of {length} tokens predict"
        )
    recipe = recipe_for_mode(mode, recipe)
    rows = (length,) * batch
    if mode == "inference":
        return MemorySetting(stored(recipe.storage), rows=rows)
    optimizer = "adamw" if recipe.optimizer == "auto" else recipe.optimizer
    spec = spec_of(recipe)
    base = stored(trainable_storage(recipe) if spec.trains_base else recipe.storage)
    if spec.trains_base:
        check_rounding(optimizer, [base.dtype])
    return MemorySetting(
        base, spec, recipe.targets, rows=rows, labelled=labelled, optimizer=optimizer,
        checkpointing=recipe.gradient_checkpointing is True,
    )  # fmt: skip


def check_fields(recipe: Recipe, supported: set[str]) -> None:
    if unread := sorted(recipe.model_fields_set - supported):
        more = sorted(ROW_FIELDS - supported)
        rows = f"; with --data also {', '.join(more)}" if more else ""
        raise LorafoldError(
            f"estimate: found {', '.join(unread)}, which the estimate does not use; expected only"
            f" {', '.join(sorted(supported))}{rows}"
        )


def recipe_for_mode(mode: str, recipe: Recipe) -> Recipe:
    """The recipe, with the mode's values for unset fields."""
    return Recipe(**(MODES.get(mode, {"method": mode}) | recipe.model_dump(exclude_unset=True)))


def stored(base: str) -> Storage:
    """The storage with this name. Its compute dtype is bf16, or fp32 for `fp32`; `auto` is bf16."""
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    return Storage(dtype, base if base in QUANTIZED else None)


def with_file_quantization(
    setting: MemorySetting, config: PreTrainedConfig, name: str, explicit: bool
) -> MemorySetting:
    """The setting with the quantization of the model's files, if they are quantized."""
    settings, base = getattr(config, "quantization_config", None), setting.base
    stored_as = None if settings is None else quantization_of(settings, f"model {name}")
    if stored_as is None and base.quantization not in IN_FILES:
        return setting
    trains = setting.spec is not None and setting.spec.trains_base
    if stored_as not in QUANTIZED or trains or (explicit and base.quantization != stored_as):
        stored_in = "not quantized" if stored_as is None else f"stored as {stored_as}"
        why = "a trained base can't be quantized" if trains else f"the estimate is for {base.name}"
        raise LorafoldError(f"model {name}: the files are {stored_in}, but {why}")
    return replace(setting, base=Storage(torch.bfloat16, stored_as))


LLAMA = {  # width, width of the MLP, blocks, heads, key heads, context
    "7b": (4096, 11008, 32, 32, 32, 4096),
    "13b": (5120, 13824, 40, 40, 40, 4096),
    "33b": (6656, 17920, 60, 52, 52, 2048),
    "65b": (8192, 22016, 80, 64, 64, 2048),
    "70b": (8192, 28672, 80, 64, 8, 4096),
}


def llama(size: str) -> PreTrainedConfig:
    from transformers import LlamaConfig

    if size.lower() not in LLAMA:
        raise LorafoldError(f"--params {size}: expected one of {', '.join(LLAMA)}")
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
