"""What people call the ways of holding a model, as settings.

    inference    no training; 16 bits unless the base is said
    full         every weight trained, in fp32 unless the base is said: 16 bytes a parameter with
                 gradients and AdamW's moments
    lora         LoRA over a base in bf16
    qlora        LoRA over a base in NF4
    any other    a method by its word, over the recipe's own base
"""

from __future__ import annotations

from typing import Any

import torch

from lorafold.errors import LorafoldError
from lorafold.memory.trace import Setting
from lorafold.models.quantized import QUANTIZATIONS
from lorafold.models.storage import Storage
from lorafold.step.fitting import spec_of, whole_base
from lorafold.step.recipe import OF_METHOD, Recipe

MODES: dict[str, dict[str, Any]] = {
    "inference": {"base": "bf16"},
    "full": {"method": "full"},
    "lora": {"method": "lora", "base": "bf16"},
    "qlora": {"method": "lora", "base": "nf4"},
}


READ = {"method", "options", "targets", "base", "optimizer", "gradient_checkpointing", *OF_METHOD}


def setting_of(
    mode: str, recipe: Recipe, batch: int, length: int, labelled: int | None = None
) -> Setting:
    """The setting that a mode and a recipe ask for; what the recipe sets itself goes over the mode.

    LorafoldError for an unknown mode, for fields of the recipe that an estimate does not read, and
    for more labels than there are tokens.
    """
    if unread := sorted(recipe.model_fields_set - READ):
        raise LorafoldError(
            f"estimate: {', '.join(unread)}: not taken into account; expected fields among"
            f" {', '.join(sorted(READ))}"
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
    base = whole_base(recipe) if spec.trains_base else recipe.base
    return Setting(
        stored(base),
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
