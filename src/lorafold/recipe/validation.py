"""What is wrong with the fields of a recipe, in one line a field."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from lorafold.advice import advice
from lorafold.errors import listed
from lorafold.recipe.fields import Fields

WORDS = {
    "missing": "one more value",
    **dict.fromkeys(("int_parsing", "int_from_float"), "a whole number"),
    "float_parsing": "a number",
}
NOWHERE: Mapping[str, str] = MappingProxyType({})


def explain(
    error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str] = NOWHERE
) -> Iterator[str]:
    """What is wrong with a recipe, field by field: what was found and what was expected."""

    def origin(field: str) -> str:
        return f" (from {sources[field]})" if field in sources else ""

    # (field, key of its entry) -> the expectations that it fails, in order, each once
    expected: dict[tuple[str, str], dict[str, None]] = {}
    strange: dict[str, list[str]] = {}  # fields that there are not, by where they come from
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if not problem["loc"]:
            yield message
            continue
        message = WORDS.get(problem["type"], message)
        if problem["type"].startswith("bool_"):
            message = "on or off"
        field, *inner = map(str, problem["loc"])
        if problem["type"] == "extra_forbidden":
            if hint := advice(field, values, Fields.model_fields):
                yield f"{field}{origin(field)} is not a field of a recipe: {hint}"
            else:
                strange.setdefault(origin(field), []).append(field)
            continue
        deep = isinstance(values[field], dict) and inner and inner[0] in values[field]
        expected.setdefault((field, inner[0] if deep else ""), {})[message] = None
    for place, names in strange.items():
        what = "is not a field" if len(names) == 1 else "are no fields"
        known = listed(Fields.model_fields, room=60)
        yield f"{listed(names, room=60)}{place} {what} of a recipe: expected one of {known}"
    for (field, key), messages in expected.items():
        found = values[field][key] if key else values[field]
        name = f"{field}.{key}" if key else field
        yield f"{name}: found {found!r}{origin(field)}, expected {' or '.join(messages)}"
