"""One recipe for many methods: each has what it has options for."""

from __future__ import annotations

from lorafold.methods import known_options, make_spec
from lorafold.models.quantized import QUANTIZATIONS
from lorafold.step.recipe import Recipe

# recipe fields that become a method's options
OF_METHODS = ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern")


def fitting(recipe: Recipe, method: str) -> Recipe:
    """The recipe without what the method has no such option for: a rank means nothing to a
    prompt.
    """
    known = known_options(method)
    blank = {name: Recipe.model_fields[name].default for name in OF_METHODS if name not in known}
    whole = (
        {"base": "fp32"} if make_spec(method).trains_base and recipe.base in QUANTIZATIONS else {}
    )
    return recipe.model_copy(
        update=blank | whole | {"options": {k: v for k, v in recipe.options.items() if k in known}}
    )
