"""The fields of the recipe as options, generated from `Recipe`: `--rank 8 --lr 1e-4 --epochs 3`.

A list is an option that is repeated, a mapping an option KEY=VALUE that is repeated. `--config
FILE` is read first; `--set` takes precedence over it, and the options over both.
"""

import re
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from lorafold.api.options import DeclaredOption, Option, RecipeOptions
from lorafold.cli.help import PLACEHOLDERS
from lorafold.cli.parameters import parameter_of, parts_of
from lorafold.errors import LorafoldError
from lorafold.methods import METHODS
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.fields import COMMON, GROUPS
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe

CONFIG = "A recipe in YAML. --set and the options below take precedence over it."
WIDEST = 50  # characters of choices as a placeholder


def options_of(declared: RecipeOptions) -> list[Parameter]:
    """The options of a recipe: of each of its fields, --set and, if asked for, --config."""
    names = fields_in(declared)
    panel = "Recipe" if names else None
    one = Option(kind=list[str], flag="--set", metavar="FIELD=VALUE", panel=panel, rare=bool(names))
    shown = [parameter_of(DeclaredOption("sets", None, None, one, declared.sets))]
    if declared.config:
        config = DeclaredOption("config", Path, None, Option(panel=panel), CONFIG)
        shown.insert(0, parameter_of(config))
    for name in Recipe.model_fields:
        panel = f"Recipe, {GROUPS[name]}" if name in GROUPS else panel
        shown += [_option(name, panel)] if name in names else []
    return shown


def recipe_of(declared: RecipeOptions, typed: Mapping[str, Any]) -> Recipe:
    """The recipe of the file, the pairs and the options.

    Raises LorafoldError as `load_recipe`.
    """
    given = {name: typed[name] for name in fields_in(declared)}
    pairs, flags = _split({n: v for n, v in given.items() if v not in (None, [])})
    sets, defaults = typed["set"] or [], declared.defaults(typed)
    config = typed["config"] if declared.config else None
    recipe = load_recipe(config, [*sets, *pairs], defaults, **flags)
    rates = {"lr": recipe.lr, "lr_b": recipe.lr_b}
    if wrong := [f"{n}: found {rate:g}" for n, rate in rates.items() if rate and rate > 1]:
        raise LorafoldError(
            f"recipe: {'; '.join(wrong)}, expected at most 1: a step of AdamW moves each number"
            " by about as much"
        )
    return recipe


def fields_in(declared: RecipeOptions) -> list[str]:
    """The names of the fields that are options."""
    every = Recipe.model_fields if declared.names is None else declared.names
    return [name for name in Recipe.model_fields if name in every and name not in declared.without]


def _option(name: str, panel: str | None) -> Parameter:
    """The option of one field: its type for the command line, its help and its default."""
    info = Recipe.model_fields[name]
    kind, choices = _kind(info.annotation)
    shown = "" if info.default in (None, {}, ()) else f"  [default: {_text(info.default)}]"
    more: dict[str, Any] = {}
    if name == "method":
        more = {"metavar": "NAME", "autocompletion": lambda: list(METHODS)}
    elif choices := list(OBJECTIVES) if name == "objective" else choices:
        numbers = [PLACEHOLDERS[part] for part in parts_of(info.annotation) if part in (int, float)]
        listed = "|".join([*numbers, *choices])
        more = {
            "metavar": listed if len(listed) < WIDEST else "NAME",  # the text has them then
            "autocompletion": lambda: choices,
        }
    elif kind == list[str]:
        mapping = isinstance(info.default, dict)
        more = {"metavar": "KEY=VALUE" if mapping else "TEXT"}
    option = typer.Option(
        rich_help_panel=panel, hidden=name not in COMMON, help=f"{info.description}{shown}", **more
    )
    annotation: Any = Annotated[kind | None, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _kind(annotation: Any) -> tuple[Any, list[str]]:
    """The type of an option's value on the command line, and its choices if it has any."""
    parts = list(parts_of(annotation))
    choices = [str(v) for part in parts if get_origin(part) is Literal for v in get_args(part)]
    if bool in parts:
        return (str, ["on", "off", *choices]) if choices else (bool, [])
    if choices:
        return str, choices
    if any(get_origin(part) is tuple and ... not in get_args(part) for part in parts):
        return tuple[float, float], []
    if any(get_origin(part) in (tuple, dict) for part in parts):
        return list[str], []
    return next((part for part in (int, float) if part in parts), str), []


def _is_name(target: str) -> bool:
    """Whether a target can only be the ending of a module's name."""
    from lorafold.core.targets import PRESETS

    return target not in PRESETS and bool(re.fullmatch(r"\w+", target))


def _split(given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(mappings as --set pairs, the values of the other fields). A single target is passed as a
    string if it is a preset or a regular expression, which a plain name is not.
    """
    pairs: list[str] = []
    flags: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(Recipe.model_fields[name].default, dict):
            pairs += [f"{name}.{pair}" for pair in value]
        elif name == "new_tokens":
            flags[name] = [word.strip() for text in value for word in text.split(",")]
        elif name == "targets" and len(value) == 1 and not _is_name(value[0]):
            flags[name] = value[0]
        else:
            flags[name] = value
    return pairs, flags
