"""JSON schemas for completions and for the arguments of calls.

At most one space may separate tokens of the JSON, because small models otherwise generate line
breaks endlessly. The key `x-guidance` of a schema, an extension by llguidance, overrides this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.serving.refusals import Refusal, invalid

COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
NOT_SCHEMAS = {"const", "enum", "default", "examples"}  # keywords whose values contain no schemas
DEFINITIONS = {"$defs", "definitions"}  # keywords whose schemas apply only through $ref
# levels of nesting and $ref; each needs up to 5.6 kB of the compiling thread's stack
MAX_DEPTH = 2000

# raises LorafoldError if (setting, text) can't be compiled to a grammar
CheckGrammar = Callable[[tuple[str, str]], None]


def schema_of(response_format: Mapping[str, Any], field: str) -> str | None:
    kind = response_format.get("type")
    known = {"json_schema", "name", "schema", "strict", "description"}
    for name in response_format.keys() - {"type", *(known if kind == "json_schema" else ())}:
        message = f"{field}.{name[:80]}: this field is not supported; remove it"
        raise Refusal(400, "unsupported_parameter", message, field)
    if kind == "text":
        return None
    if kind == "json_object":
        return compact({"type": "object"})
    inner = response_format.get("json_schema", response_format)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        expected = "text, json_object, or json_schema with a schema"
        raise invalid(field, f"found {kind!r}, expected {expected}")
    return compact(schema)


def compact(schema: Mapping[str, Any]) -> str:
    return json.dumps({"x-guidance": COMPACT} | dict(schema))


def check_recursion(schema: str, field: str) -> None:
    """Raises for a schema that requires itself or is nested too deeply."""
    whole = json.loads(schema)
    graph = {}
    for subschema, depth in _subschemas(whole):
        if depth > MAX_DEPTH:
            message = f"schemas nested more than {MAX_DEPTH:,} levels deep, directly or by $ref"
            raise invalid(field, f"found {message}")
        graph[id(subschema)] = [id(inner) for inner in _required(subschema, whole)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        message = "a schema that requires itself (by allOf or $ref), so no text can match it"
        raise invalid(field, f"found {message}") from None


def check(schema: str, field: str, check_grammar: CheckGrammar) -> None:
    """Raises for a schema that can't be compiled. Slow for large schemas."""
    check_recursion(schema, field)
    try:
        check_grammar(("schema", schema))
    except LorafoldError as error:
        raise invalid(field, f"the schema can't be compiled to a grammar ({error})") from None


def _subschemas(whole: Any) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yields each schema once, with its depth in a traversal that follows $ref first."""
    pending, seen = [(whole, 1)], set[int]()
    while pending:
        subschema, depth = pending.pop()
        if isinstance(subschema, list):
            pending += [(value, depth) for value in reversed(subschema)]
        elif isinstance(subschema, Mapping) and id(subschema) not in seen:
            seen.add(id(subschema))
            yield subschema, depth
            below = [v for key, v in subschema.items() if key not in NOT_SCHEMAS | DEFINITIONS]
            below += _required(subschema, whole)
            pending += [(value, depth + 1) for value in reversed(below)]


def _required(subschema: Mapping[str, Any], whole: Any) -> list[Mapping[str, Any]]:
    """Returns the schemas that a value must also match because of allOf and $ref."""
    every, ref = subschema.get("allOf"), subschema.get("$ref")
    required = list(every) if isinstance(every, list) else []
    if isinstance(ref, str) and ref.startswith("#"):
        for step in filter(None, ref[1:].split("/")):
            name = step.replace("~1", "/").replace("~0", "~")
            whole = whole.get(name) if isinstance(whole, Mapping) else None
        required.append(whole)
    return [schema for schema in required if isinstance(schema, Mapping)]
