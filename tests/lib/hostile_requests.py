"""Requests that mean harm: schemas that expand or nest without end, and bodies of a mebibyte.

kind, schema = hostile_schema(7)            the same for a number, each time
for path, body in asking(schema): ...       every way in which a schema reaches the server
for path, body in bodies(): ...             every route with a body of the most bytes
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]
MOST = 1 << 20  # bytes of a body
ASK = [{"role": "user", "content": "Hello"}]
INSIDE: dict[str, Callable[[Any], Schema]] = {
    "$ref": lambda one: one,
    "allOf": lambda one: {"allOf": [one]},
    "anyOf": lambda one: {"anyOf": [one, {"type": "null"}]},
    "oneOf": lambda one: {"oneOf": [one]},
    "not": lambda one: {"not": one},
    "items": lambda one: {"type": "array", "items": one},
    "prefixItems": lambda one: {"type": "array", "prefixItems": [one]},
    "properties": lambda one: {"type": "object", "properties": {"p": one}, "required": ["p"]},
    "patternProperties": lambda one: {"type": "object", "patternProperties": {"^x": one}},
    "additionalProperties": lambda one: {"type": "object", "additionalProperties": one},
}
PATTERNS = (
    "(a*)*b", "(a|aa)+$", "(([a-z])+.)+[A-Z]", "a{1000}", "(a{100}){100}", "((a{30}){30}){30}",
    "[a-z]{1,5000}x[a-z]{1,5000}", "(a?){500}a{500}", ".*a.{20}b.*", "(?=a)b", r"\p{L}{0,2000}",
    "(" * 200 + "a" + ")" * 200, "(?:.|\n){0,20000}", "(.*)*(.*)*", r"[^\x00-\x7f]{300}",
    "(?i)" + "abcdefghij" * 300, "a" * 100000, "|".join(f"w{i}" for i in range(20000)),
)  # fmt: skip


def ref(i: int) -> Schema:
    return {"$ref": f"#/$defs/a{i}"}


def from_first(parts: dict[str, Any]) -> Schema:
    return {"$ref": "#/$defs/a0", "$defs": parts}


def chain(n: int, inside: str = "$ref", times: int = 1) -> Schema:
    """n definitions, each of which leads to the next."""
    parts: dict[str, Any] = {f"a{n}": {"type": "integer"}}
    for i in range(n):
        one = ref(i + 1)
        for _ in range(times):
            one = INSIDE[inside](one)
        parts[f"a{i}"] = one
    return from_first(parts)


def _chain(draw: random.Random) -> Schema:
    n = draw.choice([100, 500, 900, 1000, 1900, 3000, 8000, 14000])
    return chain(n, draw.choice([*INSIDE]), draw.choice([1, 1, 3]))


def _cycle(draw: random.Random) -> Schema:
    n, inside = draw.choice([1, 2, 10, 300, 1000, 2500]), draw.choice([*INSIDE])
    if draw.random() < 0.3:
        own = {f"a{i}": draw.sample(range(n), min(n, 10)) for i in range(min(n, 300))}
        parts = {
            name: {"type": "object", "properties": {f"p{j}": ref(j % len(own)) for j in to}}
            for name, to in own.items()
        }
        return from_first(parts)
    leads = {f"a{i}": INSIDE[inside](ref((i + 1) % n)) for i in range(n)}
    return from_first({k: {"anyOf": [v, {"type": "null"}]} for k, v in leads.items()})


def _lattice(draw: random.Random) -> Schema:
    n, inside = draw.choice([10, 20, 30, 60, 200]), draw.choice(["allOf", "anyOf", "p", "prefix"])
    parts: dict[str, Any] = {f"a{n}": {"type": draw.choice(["integer", "string", "object"])}}
    for i in range(n):
        both = [ref(i + 1)] * draw.choice([2, 3])
        parts[f"a{i}"] = {
            "p": {"type": "object", "properties": {f"p{j}": c for j, c in enumerate(both)}},
            "prefix": {"type": "array", "prefixItems": both},
        }.get(inside) or {inside: both}
    return from_first(parts)


def _nested(draw: random.Random) -> Schema:
    one: Schema = {"type": "integer"}
    inside = draw.sample([*INSIDE][1:], draw.choice([1, 2, 3]))
    for i in range(draw.choice([20, 50, 60])):
        one = INSIDE[inside[i % len(inside)]](one)
    return one


def _combined(draw: random.Random) -> Schema:
    def leaf(i: int) -> Schema:
        return draw.choice(
            [
                {"type": "object", "properties": {f"x{i}": {"type": "string"}}},
                {"type": "string", "pattern": f"a{i}.*"},
                {"minimum": i},
                {"required": [f"x{i}"]},
                {"minLength": i},
                {"multipleOf": i + 1},
                {"enum": [i, str(i)]},
            ]
        )

    outer, inner = draw.choice(["allOf", "anyOf", "oneOf"]), draw.choice(["allOf", "anyOf"])
    n = draw.choice([5, 10, 20, 100, 1000])
    return {outer: [{inner: [leaf(i), leaf(i + 1)]} for i in range(n)]}


def _enum(draw: random.Random) -> Schema:
    n = draw.choice([1000, 20000, 80000])
    return draw.choice(
        [
            {"enum": [f"v{i}" for i in range(n)]},
            {"enum": [*range(n)]},
            {"enum": [{"a": i} for i in range(n // 2)]},
            {"enum": [[i] for i in range(n)]},
            {"anyOf": [{"const": f"v{i}"} for i in range(n // 3)]},
        ]
    )


def _pattern(draw: random.Random) -> Schema:
    one, other = draw.choice(PATTERNS), draw.choice(PATTERNS)
    return draw.choice(
        [
            {"type": "string", "pattern": one},
            {"type": "object", "patternProperties": {one: {"type": "string"}, "^y": {}}},
            {"allOf": [{"type": "string", "pattern": one}, {"type": "string", "pattern": other}]},
            {"type": "string", "pattern": one, "minLength": 5000, "maxLength": 10**9},
            {
                "type": "object",
                "properties": {
                    f"p{i}": {"type": "string", "pattern": f"{one}{i}"}
                    for i in range(min(100, 900000 // len(one)))
                },
            },
        ]
    )


def _wide(draw: random.Random) -> Schema:
    n = draw.choice([100, 2000, 20000])
    return draw.choice(
        [
            {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(n)}},
            {"type": "object", "required": [f"p{i}" for i in range(n)]},
            {"type": "array", "prefixItems": [{"type": "integer"}] * n, "minItems": n},
            {"type": "object", "patternProperties": {f"^x{i}_": {} for i in range(n // 10)}},
            {"type": "array", "items": {"type": "integer"}, "minItems": n * 10},
        ]
    )


def _numbers(draw: random.Random) -> Schema:
    return draw.choice(
        [
            {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
            {"type": "number", "minimum": 1e-300, "maximum": 1e300},
            {"type": "number", "multipleOf": 1e-300},
            {"type": "integer", "multipleOf": draw.choice([997, 99991, 10**9 + 7, 10**15])},
            {"type": "string", "minLength": 10**9},
            {"type": "object", "minProperties": 10**6},
            {"allOf": [{"type": "integer", "multipleOf": m} for m in (7, 11, 13, 17, 19, 23, 29)]},
        ]
    )


def _mixed(draw: random.Random) -> Schema:
    n = draw.choice([3, 30, 300])

    def one(depth: int) -> Any:
        if depth <= 0 or draw.random() < 0.2:
            return draw.choice(
                [ref(draw.randrange(n)), {"type": "string"}, True, False, {}, {"enum": [1, None]}]
            )
        name = draw.choice([*INSIDE][1:])
        return INSIDE[name](one(depth - 1))

    parts = {f"a{i}": one(draw.choice([1, 4])) for i in range(n)}
    return {"anyOf": [one(4), one(2)], "$defs": parts}


KINDS = (
    _chain, _cycle, _lattice, _nested, _combined, _enum, _pattern, _wide, _numbers, _mixed,
)  # fmt: skip


def hostile_schema(number: int) -> tuple[str, Schema]:
    """The kind and the schema of a number."""
    make = KINDS[number % len(KINDS)]
    return make.__name__[1:], make(random.Random(number))


def asking(schema: Schema) -> Iterator[tuple[str, bytes]]:
    """The routes that take a schema, each with a body that has it."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    form = {"type": "json_schema", "name": "x", "schema": schema}
    nested = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    own = [{"name": "f", "input_schema": schema}]
    few = {"model": "a", "max_tokens": 4}
    called = {"tool_choice": "required", "tools": tools}
    for path, body in (
        ("/v1/chat/completions", few | {"messages": ASK, "response_format": nested}),
        ("/v1/chat/completions", few | {"messages": ASK} | called),
        ("/v1/messages", few | {"messages": ASK, "output_config": {"format": form}}),
        ("/v1/messages", few | {"messages": ASK, "tools": own, "tool_choice": {"type": "any"}}),
        ("/v1/responses", {"model": "a", "input": "x", "max_output_tokens": 4,
                           "text": {"format": form}}),
        ("/v1/responses", {"model": "a", "input": "x", "max_output_tokens": 4,
                           "tool_choice": "required",
                           "tools": [{"type": "function", "name": "f", "parameters": schema}]}),
    ):  # fmt: skip
        yield path, json.dumps(body).encode()


FIELDS = {
    "/v1/completions": ("prompt", "stop", "logit_bias", "stream_options", "temperature"),
    "/v1/chat/completions": (
        "messages", "tools", "tool_choice", "stop", "logit_bias", "response_format",
        "chat_template_kwargs",
    ),
    "/v1/responses": ("input", "tools", "text", "metadata", "include", "instructions"),
    "/v1/responses/input_tokens": ("input", "tools"),
    "/v1/messages": ("messages", "tools", "system", "stop_sequences", "output_config"),
    "/v1/messages/count_tokens": ("messages", "system"),
    "/tokenize": ("prompt", "messages", "tools"),
    "/detokenize": ("tokens",),
    "/v1/load_lora_adapter": ("lora_name",),
    "/v1/adapters/a/page": ("key",),
}  # fmt: skip
ELEMENTS = (
    b"1", b"[]", b"{}", b'"a"', b"null", b"1.5", b"[1]", b'["a"]', b"[[]]", b'{"a":1}',
    b'{"type":"text","text":"a"}', b'{"role":"user","content":"x"}',
    b'{"type":"function","function":{"name":"f"}}',
)  # fmt: skip


def bodies() -> Iterator[tuple[str, bytes]]:
    """Each field of each route, with lists, objects and texts as large as a body may be."""
    for path, fields in FIELDS.items():
        head = {"model": "a", "max_tokens": 2, "messages": ASK, "prompt": "x", "input": "x"}
        if "responses" in path:
            head = {"model": "a", "input": "x", "max_output_tokens": 2}
        elif "messages" in path:
            head = {"model": "a", "messages": ASK}
        elif path == "/tokenize":
            head = {"return_token_strs": True}
        elif "chat" in path:
            del head["prompt"], head["input"]
        elif "completions" in path:
            del head["messages"], head["input"]
        else:
            head = {}
        for field in fields:
            begun = json.dumps({k: v for k, v in head.items() if k != field})[:-1].encode()
            begun += b'%s"%s":' % (b", " if len(begun) > 1 else b"", field.encode())
            room = MOST - len(begun) - 20
            for one in ELEMENTS:
                yield path, begun + b"[" + b",".join([one] * (room // (len(one) + 1))) + b"]}"
            yield path, begun + b'[1,"a"' + b',"a"' * (room // 4 - 4) + b"]}"
            pairs = [b'"%d":[]' % i for i in range(room // 12)]
            yield path, begun + b"{" + b",".join(pairs) + b"}}"
            for text in ("a", "a\\n", " ", "\U0001f600", "hello world "):
                yield path, begun + b'"' + text.encode() * (room // len(text.encode())) + b'"}'
