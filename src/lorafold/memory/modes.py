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
from lorafold.io.models import Storage
from lorafold.io.quantized import QUANTIZATIONS
from lorafold.memory.trace import Setting
from lorafold.methods import make_spec
from lorafold.train.adamw import check_rounding
from lorafold.train.base import whole_base
from lorafold.train.recipe import Recipe

MODES: dict[str, dict[str, Any]] = {
    "inference": {"base": "bf16"},
    "full": {"method": "full"},
    "lora": {"method": "lora", "base": "bf16"},
    "qlora": {"method": "lora", "base": "nf4"},
}


READ = {
    "method",
    "rank",
    "alpha",
    "dropout",
    "options",
    "targets",
    "rank_pattern",
    "alpha_pattern",
    "base",
    "optimizer",
    "gradient_checkpointing",
}


def setting_of(
    mode: str, recipe: Recipe, batch: int, length: int, labelled: int | None = None
) -> Setting:
    """The setting that a mode and a recipe ask for; what the recipe sets itself goes over the mode.

    LorafoldError for an unknown mode, for fields of the recipe that an estimate does not read, for
    more labels than there are tokens, and for an optimizer that would lose a method's updates.
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
    spec = make_spec(recipe.method, **recipe.method_options())
    base = stored(whole_base(recipe) if spec.trains_base else recipe.base)
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
