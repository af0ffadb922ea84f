"""JSON schemas that a completion, or the arguments of a call, have to fit.

Between two tokens of the JSON is one blank at most: where white space is free, a small model writes
line breaks until its limit. A schema with llguidance's `x-guidance` has its own way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from lorafold.serving.refusal import Refusal, wrong

GUIDANCE = "x-guidance"
COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
VALUES = {"const", "enum", "default", "examples"}  # what is below them is no schema


def schema_of(form: Mapping[str, Any], field: str) -> str | None:
    """The schema that a format asks for, None for text. Raises Refusal for any other format.

    Args:
        field: where it stands.
    """
    kind = form.get("type")
    known = {"json_schema", "name", "schema", "strict", "description"}
    for name in form.keys() - {"type", *(known if kind == "json_schema" else ())}:
        told = f"{field}.{name[:80]}: it is not supported"
        raise Refusal(400, "unsupported_parameter", told, field)
    if kind == "text":
        return None
    if kind == "json_object":
        return held({"type": "object"})
    inner = form.get("json_schema", form)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        expected = "text, json_object, or json_schema with a schema"
        raise Refusal(400, "invalid_value", f"{field}: found {kind!r}, expected {expected}", field)
    return held(schema)


def held(schema: Mapping[str, Any]) -> str:
    """A schema as text, with its white space."""
    return json.dumps({GUIDANCE: COMPACT} | dict(schema))


def check_founded(schema: str, field: str) -> None:
    """Raise Refusal for a schema that is its own condition. A large one takes its time.

    Args:
        field: where it stands.
    """
    whole = json.loads(schema)
    graph = {id(part): [id(one) for one in _same(part, whole)] for part in _parts(whole)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        told = "found a schema that refers to itself with nothing between, so that no text fits it"
        raise wrong(field, told) from None


def check(schema: str, field: str) -> None:
    """Raise Refusal for a schema that can't be read. A large one takes its time.

    Args:
        field: where it stands.
    """
    from llguidance import LLMatcher

    check_founded(schema, field)
    try:
        told = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    except (ValueError, TypeError) as error:
        told = str(error)
    if told:
        raise wrong(field, f"the schema can't be read ({' '.join(told.split())})")


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all below it."""
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            yield one
            left += [value for key, value in one.items() if key not in VALUES]
        elif isinstance(one, list):
            left += one


def _same(part: Mapping[str, Any], whole: Any) -> list[Mapping[str, Any]]:
    """The schemas that whatever fits a part has to fit too."""
    every, ref = part.get("allOf"), part.get("$ref")
    found = list(every) if isinstance(every, list) else []
    if isinstance(ref, str) and ref.startswith("#"):
        for step in filter(None, ref[1:].split("/")):
            name = step.replace("~1", "/").replace("~0", "~")
            whole = whole.get(name) if isinstance(whole, Mapping) else None
        found.append(whole)
    return [one for one in found if isinstance(one, Mapping)]
