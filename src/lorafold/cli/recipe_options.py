"""Generates a command-line option from each field of `Recipe`: `--rank 8 --lr 1e-4 --epochs 3`.

An option for a list is repeated, and so is an option for a mapping, as KEY=VALUE. `--set` takes
precedence over `--config FILE`, and the options over both.
"""

import re
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin

from lorafold.api.options import QUICKSTART, DeclaredOption, Option, RecipeOptions
from lorafold.cli.help import PLACEHOLDERS
from lorafold.cli.parameters import alternatives, as_typed, parameter_of
from lorafold.errors import LorafoldError
from lorafold.methods import METHODS
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.fields import COMMON, GROUPS
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe

CONFIG = "A recipe in YAML. --set and the options below take precedence over it."
MAX_CHOICES_WIDTH = 50  # characters: longer lists of choices are not used as a placeholder


def options_of(declared: RecipeOptions) -> list[Parameter]:
    names = fields_in(declared)
    panel = "Recipe" if names else None
    sets = Option(
        kind=list[str], flag="--set", metavar="FIELD=VALUE", panel=panel, rare=bool(names)
    )
    options = [DeclaredOption("config", Path, None, Option(panel=panel), CONFIG)] * declared.config
    options.append(DeclaredOption("sets", None, None, sets, declared.sets))
    for name in Recipe.model_fields:
        panel = f"Recipe, {GROUPS[name]}" if name in GROUPS else panel
        options += [_option(name, panel)] if name in names else []
    return [*map(parameter_of, options)]


def recipe_of(declared: RecipeOptions, typed: Mapping[str, Any]) -> Recipe:
    pairs = [*(typed["set"] or [])]
    fields = {}
    for name in fields_in(declared):
        value = typed[name]
        if value in (None, []):
            continue
        if isinstance(Recipe.model_fields[name].default, dict):
            pairs += [f"{name}.{pair}" for pair in value]
        elif name == "new_tokens":
            fields[name] = [word.strip() for text in value for word in text.split(",")]
        elif name == "targets" and len(value) == 1 and not _is_name_ending(value[0]):
            fields[name] = value[0]
        else:
            fields[name] = value
    config = typed["config"] if declared.config else None
    on_own_data = declared.default == QUICKSTART and typed["data"]
    default = resolve_name(declared.default) if declared.default and not on_own_data else None
    recipe = load_recipe(config, pairs, default, **fields)
    rates = {"lr": recipe.lr, "lr_b": recipe.lr_b}
    if too_high := [f"{n}: found {rate:g}" for n, rate in rates.items() if rate and rate > 1]:
        raise LorafoldError(
            f"recipe: {'; '.join(too_high)}, expected at most 1, because a step of AdamW changes"
            " each parameter by about the learning rate"
        )
    return recipe


def fields_in(declared: RecipeOptions) -> list[str]:
    every = Recipe.model_fields if declared.names is None else declared.names
    return [name for name in Recipe.model_fields if name in every and name not in declared.without]


def _option(name: str, panel: str | None) -> DeclaredOption:
    info = Recipe.model_fields[name]
    kind, choices = _kind(info.annotation)
    choices = {"method": [*METHODS], "objective": [*OBJECTIVES]}.get(name, choices)
    metavar = "KEY=VALUE" if isinstance(info.default, dict) else None
    if choices:
        numbers = [PLACEHOLDERS[k] for k in alternatives(info.annotation) if k in (int, float)]
        metavar = "|".join([*numbers, *choices])
        metavar = metavar if len(metavar) < MAX_CHOICES_WIDTH else "NAME"  # the help lists them
    default = "" if info.default in (None, {}, ()) else f"  [default: {as_typed(info.default)}]"
    option = Option(
        kind=kind, metavar=metavar, panel=panel, rare=name not in COMMON, choices=tuple(choices)
    )
    return DeclaredOption(name, None, None, option, f"{info.description}{default}")


def _kind(annotation: Any) -> tuple[Any, list[str]]:
    kinds = [*alternatives(annotation)]
    choices = [str(v) for kind in kinds if get_origin(kind) is Literal for v in get_args(kind)]
    if bool in kinds:
        return (str, ["on", "off", *choices]) if choices else (bool, [])
    if choices:
        return str, choices
    if any(get_origin(kind) is tuple and ... not in get_args(kind) for kind in kinds):
        return tuple[float, float], []
    if any(get_origin(kind) in (tuple, dict) for kind in kinds):
        return list[str], []
    return next((kind for kind in (int, float) if kind in kinds), str), []


def _is_name_ending(target: str) -> bool:
    """Whether a target is the ending of a module's name. Presets and regular expressions are passed
    to the recipe as strings and not as lists.
    """
    from lorafold.core.targets import PRESETS

    return target not in PRESETS and bool(re.fullmatch(r"\w+", target))
