"""How the base of a run is held: as the recipe asks, and where it does not ask, as what is there
already needs it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.record import base_trained_on
from lorafold.models.quantized import QUANTIZATIONS
from lorafold.models.sources import ModelSource
from lorafold.models.storage import held_as
from lorafold.step.recipe import Recipe


def whole_base(recipe: Recipe) -> str:
    """The word where the base's own weights are trained: fp32 unless the recipe asks for bf16.

    LorafoldError where it asks to pack them.
    """
    word = str(recipe.base)
    if word in QUANTIZATIONS and "base" in recipe.model_fields_set:
        raise LorafoldError(
            f"base {word}: {recipe.method} trains the base's own weights, which can't be packed;"
            " expected fp32 or bf16"
        )
    return "fp32" if word in (*QUANTIZATIONS, "auto") else word


def settled_base(
    recipe: Recipe, spec: Spec, source: ModelSource, init_adapter: Path | None = None
) -> str:
    """The word to load the base by. LorafoldError for a packed base that can't be had.

    What the recipe does not set follows the model's files if these are packed, then the adapter to
    start from, then the recipe's default, which is unpacked for a method that trains the base's own
    weights, and where bitsandbytes is not there to pack them.
    """
    word, asked = str(recipe.base), "base" in recipe.model_fields_set
    if spec.trains_base:
        return whole_base(recipe)
    if not asked:
        stored = held_as(source)
        word = (
            stored
            if stored != "auto"
            else base_trained_on([init_adapter] if init_adapter else []) or word
        )
    if word in QUANTIZATIONS and importlib.util.find_spec("bitsandbytes") is None:
        if asked:
            raise LorafoldError(
                f"base {word}: bitsandbytes packs the weights, and is not installed; expected bf16,"
                " fp32 or auto"
            )
        return "auto"
    return word
