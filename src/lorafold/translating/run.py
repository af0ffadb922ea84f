"""From another tool's file to a translation, and the recipe to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorafold.errors import LorafoldError
from lorafold.files.atomic import read_object, write_text
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.laws import chosen, law_of
from lorafold.peft.config import CONFIG
from lorafold.recipe.fitting import left_out, spec_of, trainable_storage
from lorafold.recipe.reading import kind_of as in_words
from lorafold.recipe.reading import parse_yaml, text_of
from lorafold.recipe.recipe import UNWORDED, Recipe
from lorafold.translating.rules import TranslatedKey, left
from lorafold.translating.tools import TOOLS, kind_of
from lorafold.translating.translation import Translation
from lorafold.translating.unsloth_script import arguments_of


def translate(path: str | Path, kind: str | None = None) -> Translation:
    """A configuration of another tool as a recipe, with a report on every key.

    `kind` is the tool, a key of TOOLS; without it the file's own keys tell. LorafoldError names the
    file and every value that can't be read, or can't be trained here.
    """
    if kind is not None and kind not in TOOLS:
        raise LorafoldError(f"kind {kind!r}: expected {', '.join(TOOLS)}")
    source = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    config = _read(source, kind)
    tool = TOOLS[kind or kind_of(source, config)]
    try:
        entries = tool.entries(config)
        recipe = _recipe(entries)
        if spec_of(recipe).trains_base:
            trainable_storage(recipe)
    except LorafoldError as error:
        raise LorafoldError(f"{source}: {error}") from None
    entries = tuple(_without(entry, left_out(recipe), recipe.method) for entry in entries)
    by_outcome = {
        how: tuple(entry for entry in entries if entry.outcome.how == how)
        for how in ("taken", "changed", "left")
    }
    return Translation(source, tool.name, _recipe(entries), **by_outcome, note=tool.note)


def write(translation: Translation, out: str | Path, overwrite: bool = False) -> None:
    """Write the recipe to a YAML file.

    Args:
        translation: The recipe and what became of each key.
        overwrite: Whether a file that exists is replaced.

    Raises:
        LorafoldError: `out` exists and `overwrite` is off, or it is a directory.
    """
    check_free(out, overwrite)
    write_text(out, translation.to_yaml(str(out)))


def check_free(out: str | Path, overwrite: bool) -> None:
    """Raise LorafoldError where `out` is a directory, or exists and `overwrite` is off."""
    if Path(out).is_dir():
        raise LorafoldError(f"{out}: found a directory, expected a file for the recipe")
    if os.path.lexists(out) and not overwrite:
        raise LorafoldError(f"{out} exists; pass --overwrite to replace it")


def _read(path: Path, kind: str | None) -> Mapping[str, Any]:
    text = text_of(path, "a training configuration")
    if not text.strip():
        raise LorafoldError(f"{path}: found an empty file, expected a training configuration")
    if path.suffix == ".py" or kind == "unsloth":
        return arguments_of(text, str(path))
    if path.suffix == ".json":
        return read_object(path)
    found = parse_yaml(text, str(path))
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise LorafoldError(
            f"{path}: found {in_words(found)}, expected `name: value` lines of a training"
            " configuration"
        )
    return found


def _recipe(entries: Sequence[TranslatedKey]) -> Recipe:
    """The recipe of all entries' fields. LorafoldError names the keys of those it refuses."""
    values: dict[str, Any] = {}
    for entry in entries:
        for name, value in entry.outcome.fields.items():
            values[name] = _joined(values.get(name), value)
    try:
        recipe = Recipe.model_validate(values, context=UNWORDED)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0]) if problem["loc"] else ""
            keys = [e.key for e in entries if name in e.outcome.fields]
            problems[name] = (
                f"{', '.join(keys)}: found {values.get(name)!r} as recipe field {name};"
                f" {problem['msg'].removeprefix('Value error, ').lower()}"
            )
        raise LorafoldError("; ".join(problems.values())) from None
    declared = OBJECTIVES[recipe.objective]
    if declared.law:
        check = chosen if declared.draws else law_of
        try:
            check(recipe.objective, recipe.beta, recipe.objective_options)
        except LorafoldError as error:
            keys = [e.key for e in entries if {"beta", "objective_options"} & {*e.outcome.fields}]
            raise LorafoldError(f"{', '.join(keys)}: {error}") from None
    return recipe


def _joined(before: Any, value: Any) -> Any:
    """The later value; of trackers, tokens and options, to which two keys may add, both values."""
    if isinstance(before, tuple) and isinstance(value, tuple) and before != value:
        return (*before, *(one for one in value if one not in before))
    return {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _without(entry: TranslatedKey, names: Sequence[str], method: str) -> TranslatedKey:
    """The entry without fields that the method has no option for."""
    absent = [name for name in entry.outcome.fields if name in names]
    if not absent:
        return entry
    rest = {k: v for k, v in entry.outcome.fields.items() if k not in absent}
    told = left(f"method {method} has no option {', '.join(absent)}")
    return replace(entry, outcome=replace(entry.outcome, fields=rest) if rest else told)
