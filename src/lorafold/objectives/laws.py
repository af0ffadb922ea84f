"""The law of an objective that has one: its class, by the row of the table, and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any, TypeVar

from pydantic import ValidationError

from lorafold.errors import LorafoldError
from lorafold.objectives import Declared

L = TypeVar("L")


def class_of(declared: Declared, laws: ModuleType) -> Any:
    """The class of the law that a row of the table names, itself or by its name among `laws`."""
    return getattr(laws, declared.law) if isinstance(declared.law, str) else declared.law


def made(kind: type[L], given: Mapping[str, Any], objective: str, besides: Sequence[str] = ()) -> L:
    """A law, or other checked options, with what is given.

    Args:
        besides: Options that the objective has elsewhere.

    Raises LorafoldError for an option that it does not have, or a value out of its range.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in given if name not in known]:
        field = "" if unknown == ["beta"] else "objective_options: "
        raise LorafoldError(
            f"{field}{', '.join(unknown)}: the objective {objective} has no such option; it has:"
            f" {', '.join([*known, *besides])}"
        )
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise LorafoldError(
            f"objective {objective}: {'.'.join(map(str, first['loc']))}: found {first['input']!r},"
            f" expected {first['msg'].removeprefix('Input should be ')}"
        ) from None
