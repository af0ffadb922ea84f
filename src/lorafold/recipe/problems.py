"""What is wrong with the fields of a recipe, in one line a field."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from lorafold.recipe.fields import Fields

NOWHERE: Mapping[str, str] = MappingProxyType({})


def explain(
    error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str] = NOWHERE
) -> Iterator[str]:
    """What is wrong with a recipe, field by field: what was found and what was expected.

    Args:
        error: What pydantic says of the values.
        values: The fields that were given.
        sources: Where each comes from, by its name; one that comes from a call has none.
    """

    def origin(field: str) -> str:
        return f" (from {sources[field]})" if field in sources else ""

    # (field, key of its entry) -> the expectations that it fails, in order, each once
    expected: dict[tuple[str, str], dict[str, None]] = {}
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if not problem["loc"]:
            yield message
            continue
        if problem["type"] == "missing":
            message = "one more value"
        elif problem["type"].startswith("bool_"):
            message = "on or off"
        field, *inner = map(str, problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(field, Fields.model_fields, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"expected one of {', '.join(Fields.model_fields)}"
            )
            yield f"{field}{origin(field)} is not a field of a recipe: {hint}"
            continue
        deep = isinstance(values[field], dict) and inner and inner[0] in values[field]
        expected.setdefault((field, inner[0] if deep else ""), {})[message] = None
    for (field, key), messages in expected.items():
        found = values[field][key] if key else values[field]
        name = f"{field}.{key}" if key else field
        yield f"{name}: found {found!r}{origin(field)}, expected {' or '.join(messages)}"
