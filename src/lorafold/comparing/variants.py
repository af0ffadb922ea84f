"""What is compared: each method, with every combination of the settings that vary.

    variants(recipe, ["lora", "ia3"], {"rank": [8, 16], "lr": [1e-4, 2e-4]})

has four of lora and two of ia3, which has no rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lorafold.errors import LorafoldError, listed
from lorafold.methods import known_options
from lorafold.recipe.fields import OF_METHOD, OF_TRAINING
from lorafold.recipe.fitting import fitting
from lorafold.recipe.reading import load_recipe
from lorafold.recipe.recipe import Recipe

Vary = Mapping[str, Sequence[Any]]  # the values of each field, or of an entry of one: options.init


@dataclass(frozen=True)
class Variant:
    """A method, and the settings that it has beside those of the common recipe."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = self.settings.items()
        named = (f"{name.removeprefix('options.')}={in_short(v)}" for name, v in settings)
        return " ".join((self.method, *named))

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these settings.

        Raises LorafoldError for values that a recipe can't have.
        """
        try:
            pairs = [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in self.settings.items()]
            return load_recipe(None, pairs, recipe)
        except TypeError as error:
            raise LorafoldError(f"vary: {error}, expected numbers, texts or lists") from None
        except LorafoldError as error:
            said = str(error).removeprefix("recipe: ").replace(" (from --set)", "")
            raise LorafoldError(f"vary: {said.removeprefix('--set ')}") from None


def variants(recipe: Recipe, methods: Sequence[str], vary: Vary) -> list[Variant]:
    """The methods in their order, each with every combination of the settings that it has.

    Args:
        recipe: The common recipe.
        methods: The names of the methods.
        vary: The values of each setting.

    Raises LorafoldError for a field that changes what is measured, for one without values, for
    values that a recipe can't have, for epochs beside steps, and for a setting that no method has.
    """
    vary = checked(vary)
    if "epochs" in vary and ("steps" in vary or recipe.steps is not None):
        raise LorafoldError(
            "vary: found epochs beside steps, which are how long a run is; expected one of the two"
        )
    found: list[Variant] = []
    for method in methods:
        fitted: list[dict[str, Any]] = []
        for values in product(*vary.values()):
            settings = dict(zip(vary, values, strict=True))
            asked = Variant(method, settings).of(recipe)
            one = fitting(asked, method)
            absent = {*OF_METHOD}.difference(known_options(method, asked.options.get("over")))
            has = {
                name: value
                for name, value in settings.items()
                if name.partition(".")[0] not in absent and entry(one, name) == entry(asked, name)
            }
            variant = Variant(method, has)
            if (dumped := fitting(variant.of(recipe), method).model_dump()) not in fitted:
                fitted.append(dumped)
                found.append(variant)
    if unknown := [name for name in vary if not any(name in one.settings for one in found)]:
        raise LorafoldError(
            f"vary: found {listed(unknown)}, expected settings that one of {', '.join(methods)} has"
        )
    names = [str(one) for one in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise LorafoldError(
            f"found {listed(twice)} twice (methods, vary); expected different methods, and settings"
            " whose names differ"
        )
    return found


def checked(vary: Vary) -> dict[str, list[Any]]:
    """The values by their field. LorafoldError unless these can vary, and each has values."""
    found: dict[str, list[Any]] = {}
    for name, values in vary.items():
        if (whole := name.partition(".")[0]) not in OF_TRAINING:
            instead = {"method": "; name methods", "seed": "; give a number of seeds"}.get(whole)
            raise LorafoldError(
                f"vary: found {name}, expected a field that changes what is trained and not what it"
                f" is measured by: {', '.join(sorted(OF_TRAINING))}{instead or ''}"
            )
        several = isinstance(values, Iterable) and not isinstance(values, str | Mapping)
        found[name] = [*values] if several else []
        if not found[name]:
            raise LorafoldError(f"vary: {name}: found {values!r:.80}, expected a list of values")
    return found


def entry(recipe: Recipe, name: str) -> Any:
    """What a recipe has under the name of a field, or of an entry of one."""
    whole, _, inner = name.partition(".")
    value = getattr(recipe, whole)
    return value.get(inner) if inner else value


def in_short(value: Any) -> str:
    """A value of a recipe as it stands in a name."""
    if isinstance(value, list | tuple):
        return ",".join(map(in_short, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(float(value))
    return str(value)
