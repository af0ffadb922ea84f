"""The fields of the recipe as options, generated from `Recipe`: `--rank 8 --lr 1e-4 --epochs 3`.

    @of_recipe(Recipe.model_fields)
    class Flags(RecipeFlags): ...                      a group of options (`cli.groups`)

    @grouped
    def command(flags: Flags): recipe = flags.recipe()

A list is an option that is repeated, a mapping an option KEY=VALUE that is repeated. `--config
FILE` is read first; `--set` takes precedence over it, and the options over both.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from lorafold.cli.help import PLACEHOLDERS
from lorafold.errors import LorafoldError
from lorafold.methods import METHODS
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.fields import COMMON, GROUPS
from lorafold.recipe.reading import load_recipe
from lorafold.recipe.recipe import Recipe

CONFIG = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel="Recipe",
        help="A recipe in YAML. --set and the options below take precedence over it.",
    ),
]
SETS = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        rich_help_panel="Recipe",
        hidden=True,
        help="One field of the recipe, as in --set rank=8.",
    ),
]

WIDEST = 50  # characters of choices as a placeholder


class RecipeFlags:
    """A group of options for a recipe, which `of_recipe` adds to a subclass."""

    def recipe(self, defaults: Recipe | None = None, **fixed: Any) -> Recipe:
        """The recipe of the file, the pairs and the options.

        Raises LorafoldError as `load_recipe`.
        """
        given = {n: v for n, v in vars(self).items() if v not in (None, [])}
        config, sets = given.pop("config", None), given.pop("sets", [])
        pairs, flags = _split(given)
        recipe = load_recipe(config, [*sets, *pairs], defaults, **flags, **fixed)
        rates = {"lr": recipe.lr, "lr_b": recipe.lr_b}
        if wrong := [f"{n}: found {rate:g}" for n, rate in rates.items() if rate and rate > 1]:
            raise LorafoldError(
                f"recipe: {'; '.join(wrong)}, expected at most 1: a step of AdamW moves each number"
                " by about as much"
            )
        return recipe


Flags = TypeVar("Flags", bound=type[RecipeFlags])


def of_recipe(names: Collection[str], config: bool = True) -> Callable[[Flags], Flags]:
    """A decorator that adds options to a subclass of RecipeFlags: one for each of these fields,
    --set and, if asked for, --config.
    """

    def decorate(group: Flags) -> Flags:
        options, panel = ({"config": CONFIG} if config else {}) | {"sets": SETS}, ""
        for name in Recipe.model_fields:
            panel = GROUPS.get(name, panel)
            if name in names:
                options[name] = _option(name, f"Recipe, {panel}")
        group.__annotations__ = options
        for name in options:
            setattr(group, name, None)
        return dataclass(frozen=True)(group)  # type: ignore[return-value]

    return decorate


def _option(name: str, panel: str) -> Any:
    """The option of one field: its type for the command line, its help and its default."""
    info = Recipe.model_fields[name]
    kind, choices = _kind(info.annotation)
    shown = "" if info.default in (None, {}, ()) else f"  [default: {_text(info.default)}]"
    more: dict[str, Any] = {}
    if name == "method":
        more = {"metavar": "NAME", "autocompletion": lambda: list(METHODS)}
    elif choices := list(OBJECTIVES) if name == "objective" else choices:
        numbers = [PLACEHOLDERS[part] for part in _parts(info.annotation) if part in (int, float)]
        listed = "|".join([*numbers, *choices])
        more = {
            "metavar": listed if len(listed) < WIDEST else "NAME",  # the text has them then
            "autocompletion": lambda: choices,
        }
    elif kind == list[str]:
        mapping = isinstance(info.default, dict)
        more = {"metavar": "KEY=VALUE" if mapping else "TEXT"}
    return Annotated[
        kind | None,
        typer.Option(
            rich_help_panel=panel,
            hidden=name not in COMMON,
            help=f"{info.description}{shown}",
            **more,
        ),
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _kind(annotation: Any) -> tuple[Any, list[str]]:
    """The type of an option's value on the command line, and its choices if it has any."""
    parts = list(_parts(annotation))
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


def _parts(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without None and without constraints."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif annotation is not type(None):
        yield annotation


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
