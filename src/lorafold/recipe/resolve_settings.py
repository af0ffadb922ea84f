"""Resolution of the settings that a recipe leaves open.

In decreasing order of precedence, a setting comes from the recipe, the model's files, the adapters
of the run, and the defaults.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from rich.console import Console

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.terminal import print_lines
from lorafold.methods import known_options, make_spec
from lorafold.models.loading import default_storage
from lorafold.models.positions import Positions, positions_in
from lorafold.models.quantizations import ON_LOAD, QUANTIZED, UNQUANTIZED
from lorafold.objectives import OBJECTIVES
from lorafold.peft.adapter_directory import SavedAdapter, training_storage_of
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base

DEFAULT_MAX_LENGTH: int = Recipe.model_fields["max_length"].default


def ignored_fields(recipe: Recipe) -> list[str]:
    """The fields that are set in the recipe although its method has no such option."""
    known = known_options(recipe.method, recipe.options.get("over"))
    return [name for name in recipe.for_method() if name not in known]


def ignored_note(recipe: Recipe) -> str | None:
    names, over = ignored_fields(recipe), recipe.options.get("over")
    method = recipe.method if over is None else f"{recipe.method} over {over}"
    return f"{', '.join(names)} ignored: {method} has no such option" if names else None


def spec_of(recipe: Recipe) -> Spec:
    """The spec of the recipe's method, without the recipe's `ignored_fields`."""
    known = known_options(recipe.method, recipe.options.get("over"))
    fields = {name: value for name, value in recipe.for_method().items() if name in known}
    samples = OBJECTIVES[recipe.objective].draws
    if samples and "dropout" in known:
        if given := recipe.options.get("dropout", recipe.dropout):
            raise LorafoldError(
                f"dropout: found {given}, expected 0: the objective {recipe.objective}"
                " compares the trained model with the model that sampled the completions"
            )
        fields["dropout"] = 0.0
    spec = make_spec(recipe.method, **fields | recipe.options)
    if samples and spec.asks_losses:
        raise LorafoldError(
            f"method: {recipe.method} chooses the weights to train from the loss of the rows, but"
            f" the objective {recipe.objective} has no loss before sampling; use another method"
        )
    return spec


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The same recipe for another method, without the options that this method lacks, and without
    quantization if this method trains the base model's weights.
    """
    known = known_options(method, recipe.options.get("over"))
    unset = [name for name in recipe.for_method() if name not in known]
    changes = {name: Recipe.model_fields[name].default for name in unset}
    changes["options"] = {name: value for name, value in recipe.options.items() if name in known}
    if make_spec(method).trains_base and recipe.storage in QUANTIZED:
        changes["storage"] = "fp32"
    return recipe.model_copy(update=changes | {"method": method})


def trainable_storage(recipe: Recipe) -> str:
    """The dtype of base weights that are trained: fp32, unless bf16 is set in the recipe."""
    storage = str(recipe.storage)
    if storage in QUANTIZED and "storage" in recipe.model_fields_set:
        raise LorafoldError(
            f"storage {storage}: {recipe.method} trains the base's own weights, which can't be"
            " quantized; expected fp32 or bf16"
        )
    return "fp32" if storage in (*QUANTIZED, "auto") else storage


def resolve_storage(
    recipe: Recipe, spec: Spec, base: Base, adapters: Sequence[SavedAdapter] = ()
) -> str:
    """The quantization or dtype in which to load the base model.

    In decreasing order of precedence: the recipe's setting, the quantization of the model's files,
    the quantization or dtype of the adapters' training, the recipe's default. The default is not
    quantized if bitsandbytes is not installed, or if the method trains the base model's weights.
    """
    storage, is_set = str(recipe.storage), "storage" in recipe.model_fields_set
    if base.loaded is not None:
        return base.storage
    if spec.trains_base:
        return trainable_storage(recipe)
    if not is_set:
        in_files, made_on = default_storage(base.source), training_storage_of(adapters)
        if in_files != "auto":
            storage = in_files
        elif made_on is not None and made_on.storage in (*ON_LOAD, *UNQUANTIZED):
            storage = made_on.storage
    if storage not in ON_LOAD or importlib.util.find_spec("bitsandbytes") is not None:
        return storage
    if is_set:
        raise LorafoldError(
            f"storage {storage}: requires bitsandbytes, which is not installed; run pip install"
            " bitsandbytes, or use bf16, fp32 or auto"
        )
    return "auto"


def resolve_length(recipe: Recipe, base: Base, before: int, console: Console) -> Recipe:
    """The recipe with `max_length` as set, or else with a default that fits the base model's
    positions after the first `before`, which the adapters' virtual tokens occupy.
    """
    requested = recipe.max_length if "max_length" in recipe.model_fields_set else None
    head = OBJECTIVES[recipe.objective].head
    positions = positions_in(base.config(), head, base.trust_remote_code)
    length = fit_length(positions, requested, before, console)
    return recipe.model_copy(update={"max_length": length} if length != recipe.max_length else {})


def fit_length(positions: Positions, requested: int | None, before: int, console: Console) -> int:
    length, remark = positions.after(before).fitted(requested, DEFAULT_MAX_LENGTH)
    print_lines(console, remark)
    return length
