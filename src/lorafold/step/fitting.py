"""How a recipe fits what is there: the method's own options, the model's files, the adapter to
start from. What a recipe sets goes first; where it is silent, what is there decides.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.record import base_trained_on
from lorafold.methods import known_options, make_spec
from lorafold.models.quantizing import QUANTIZATIONS
from lorafold.models.sources import ModelSource
from lorafold.models.storage import held_as
from lorafold.step.recipe import Recipe


def left_out(recipe: Recipe) -> list[str]:
    """The fields that the recipe sets and its method has no option for, such as a prompt's rank."""
    known = known_options(recipe.method, recipe.options.get("over"))
    return [name for name in recipe.for_method() if name not in known]


def without(recipe: Recipe) -> str | None:
    """A line that says what is `left_out`, or None where nothing is."""
    names, over = left_out(recipe), recipe.options.get("over")
    method = recipe.method if over is None else f"{recipe.method} over {over}"
    return f"{', '.join(names)} left out: {method} has no such option" if names else None


def spec_of(recipe: Recipe) -> Spec:
    """The spec of the recipe's method, without the fields that are `left_out`.

    LorafoldError for an unknown method, and for further options that it does not have.
    """
    absent = left_out(recipe)
    fields = {name: value for name, value in recipe.for_method().items() if name not in absent}
    return make_spec(recipe.method, **fields | recipe.options)


def fitting(recipe: Recipe, method: str) -> Recipe:
    """One recipe for many methods: for this one, without the options that it does not have."""
    known = known_options(method, recipe.options.get("over"))
    unset = [name for name in recipe.for_method() if name not in known]
    changes: dict[str, Any] = {name: Recipe.model_fields[name].default for name in unset}
    changes["options"] = {name: value for name, value in recipe.options.items() if name in known}
    if make_spec(method).trains_base and recipe.base in QUANTIZATIONS:
        changes["base"] = "fp32"
    return recipe.model_copy(update=changes | {"method": method})


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
