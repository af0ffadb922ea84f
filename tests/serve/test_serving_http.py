"""HTTP: paths, HEAD, other origins, the description of the API, vLLM's load route, and refusals:
no field that changes an answer is ignored.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from lorafold.errors import LorafoldError
from lorafold.serving.settings import read_settings
from serving_cases import ADMIN, ASK, Answer, Running, raw

pytest_plugins = ["serving_fixtures"]
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def server(serve) -> Running:
    return serve(cors=[ORIGIN])


def test_a_slash_at_the_end_changes_nothing(server: Running) -> None:
    assert server.ask("/v1/models/").json == server.ask("/v1/models").json
    assert server.ask("/v1/models/a/").json["id"] == "a"
    assert server.ask("/v1/chat/completions/", CHAT | {"max_tokens": 2}).status == 200
    assert server.ask("/v1/nothing/").code == "no_route"


@pytest.mark.parametrize("path", ["/", "/v1/models", "/livez", "/openapi.json"])
def test_head_is_get_without_a_body(server: Running, path: str) -> None:
    got, head = server.ask(path), server.ask(path, method="HEAD")
    assert (head.status, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]
    assert server.ask("/v1/completions", method="HEAD").status == 405


def preflight(server: Running, origin: str) -> Answer:
    asked = {"Access-Control-Request-Method": "POST", "Origin": origin}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    return server.ask("/v1/chat/completions", method="OPTIONS", headers=asked)


def test_pages_of_named_origins_may_ask_and_no_others(server: Running) -> None:
    allowed = preflight(server, ORIGIN)
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    found = server.ask(TURNS, CHAT | {"max_tokens": 2}, headers={"Origin": ORIGIN})
    assert found.headers["access-control-allow-origin"] == ORIGIN
    refused = server.ask("/v1/chat/completions", {}, headers={"Origin": ORIGIN})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (400, ORIGIN)
    for origin in ("https://app.example.evil.example", "http://app.example", "null"):
        assert preflight(server, origin).status == 400
        other = server.ask("/v1/models", headers={"Origin": origin})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["*", "https://*.example", "app.example", "https://a.b/c"])
def test_an_origin_is_an_address_without_a_path(origin: str) -> None:
    with pytest.raises(LorafoldError, match=r"cors\.0: found"):
        read_settings(None, {"cors": [origin]})


def test_the_description_has_every_body(server: Running) -> None:
    found = server.ask("/openapi.json").json
    schemas = found["components"]["schemas"]
    for methods in found["paths"].values():
        for method, operation in methods.items():
            body = operation.get("requestBody")
            if method in ("post", "put") and body is not None:
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                assert schemas[name]["type"] == "object"
    chat = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert chat["application/json"]["schema"]["$ref"].endswith("/ChatBody")
    assert "response_format" in schemas["ChatBody"]["properties"]
    bare = {
        path for path, methods in found["paths"].items() for method, o in methods.items()
        if method in ("post", "put") and "requestBody" not in o
    }  # fmt: skip
    assert bare == {"/v1/adapters/{name}/page", "/admin/adapters/{name}:{act}"}


def load(server: Running, **more: Any) -> Answer:
    return server.ask("/v1/load_lora_adapter", {"lora_name": "a"} | more, key=ADMIN)


def test_a_path_to_the_directory_s_entry_is_its_name(server: Running, tmp_path: Path) -> None:
    entry = server.folder / "a"
    (tmp_path / "link").symlink_to(entry)
    for path in (entry, os.path.relpath(entry), f"{entry}/../a/", tmp_path / "link"):
        assert load(server, lora_path=str(path), lora_int_id=1).json["status"] == "loaded"
    for path in ("/etc", str(server.folder), "a", "", "x\0", "y" * 9999, "org/adapter"):
        answer = load(server, lora_path=path)
        assert answer.status == 400, path
        assert answer.json["error"]["param"] == "lora_path"


def test_a_load_may_refuse_to_replace(server: Running) -> None:
    again = load(server, load_inplace=False)
    assert again.json["error"]["param"] == "load_inplace"
    assert "is already loaded" in again.json["error"]["message"]
    assert load(server, load_inplace=True, base_model_name="any").status == 200
    named = {"lora_name": "a", "lora_int_id": 1}
    assert server.ask("/v1/unload_lora_adapter", named, ADMIN).status == 200
    assert load(server, load_inplace=False).status == 200


CHAT = {"model": "a", "messages": ASK}

PLAIN = {"model": "a", "prompt": "The"}
RESPOND = {"model": "a", "input": "x"}
TURNS = "/v1/chat/completions"
# it can be read, and has more rules at its second token than there may be
SCHEMA = {"anyOf": [{"type": "array", "items": [{"const": str(i)}]} for i in range(2500)]}
AMBIGUOUS = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
AMBIGUOUS_TEXT = {"type": "json_schema", "name": "x", "schema": SCHEMA}
CIRCLE = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/y"}},
    "$defs": {"y": {"allOf": [{"$ref": "#/$defs/y"}]}},
}
FALSE = {"type": "object", "properties": {"x": False}, "required": ["x"]}


WRITE, RESPONSES = "/v1/completions", "/v1/responses"


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "schema": value}


def wrong(path: str, body: Any, code: str, *rows: Any) -> list[Any]:
    """Requests that are refused for one field, which is the row's first one unless it is given."""
    pairs = [row if isinstance(row, tuple) else (row, next(iter(row))) for row in rows]
    return [(path, body | more, code, param) for more, param in pairs]


REFUSED = [
    *wrong(
        TURNS, CHAT, "unsupported_parameter",
        {"audio": {"voice": "x"}}, {"top_a": 0.5}, {"store": True}, {"echo": True},
        {"response_format": {"type": "json_object", "schema": {}}},
        ({"messages": [ASK[0] | {"audio": {"id": 1}}]}, "messages[0].audio"),
    ),
    *wrong(
        TURNS, CHAT, "invalid_value",
        {"temperature": -1}, {"temperature": "0.5"}, {"top_p": 0}, {"n": 1000000}, {"n": 0},
        {"stop": ["x"] * 10000}, {"stop": [""]}, {"max_tokens": -5}, {"top_logprobs": 2},
        {"top_logprobs": 21, "logprobs": True}, {"response_format": {"type": "xml"}},
        {"tool_choice": "required"}, {"tool_choice": {"type": "allowed_tools", "mode": "auto"}},
        {"reasoning_effort": "high"}, {"verbosity": "low"}, {"messages": []},
        {"max_completion_tokens": 0}, {"max_tokens": 3, "max_completion_tokens": 5},
        {"response_format": AMBIGUOUS}, {"response_format": schema({"$ref": "#"})},
        {"response_format": schema(CIRCLE)},
        ({"chat_template_kwargs": {"eos_token": "x"}}, "eos_token"),
        ({"chat_template_kwargs": {"x": 1}}, "x"), ({"tools": [{"type": "web"}]}, "tools[0].name"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "me", "content": "x"}]}, "messages[0].role"),
        ({"messages": [ASK[0] | {"name": 5}]}, "messages[0].name"),
    ),
    *wrong(TURNS, CHAT, "context_length_exceeded", ({"max_tokens": 100000}, "messages")),
    *wrong(TURNS, CHAT, "model_not_found", {"model": "nobody"}),
    *wrong(TURNS, CHAT, "template_refuses", ({"tools": [{"type": "function", "function": {
        "name": "x", "parameters": {"properties": 5}}}]}, "messages")),
    (TURNS, {"messages": ASK}, "missing_parameter", "model"),
    (TURNS, [1], "invalid_json", None),
    *wrong(
        WRITE, PLAIN, "invalid_value",
        {"prompt": ""}, {"prompt": []}, {"prompt": [300]}, {"prompt": [-1]}, {"prompt": ["x"] * 99},
        {"max_tokens": 0, "echo": True}, {"logit_bias": {"x": 1}}, {"logit_bias": {"99999": 1}},
        {"logit_bias": {"5": 1e39}}, {"temperature": 1e39}, {"presence_penalty": -1e39},
        {"repetition_penalty": 0}, {"prompt": ["x"] * 4, "n": 3},
    ),
    *wrong(WRITE, PLAIN, "unsupported_parameter", {"suffix": "x"}),
    *wrong(
        RESPONSES, RESPOND, "invalid_value",
        *(({"text": {"format": form}}, "text.format")
          for form in (AMBIGUOUS_TEXT, "x", schema(CIRCLE), schema(FALSE))),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"verbosity": ""}}, "text.verbosity"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"reasoning": {"effort": 0}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"input": [{"type": "image"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content"),
        ({"instructions": "x", "input": [ASK[0], {"role": "me", "content": "x"}]}, "input[1].role"),
        ({"input": [ASK[0], {"type": "function_call", "call_id": "1", "name": "x",
                             "arguments": "y"}]}, "input[1].arguments"),
        {"max_output_tokens": 0}, {"top_logprobs": 2}, {"truncation": "some"},
        ({"include": ["x"]}, "include[0]"), {"metadata": {f"{i}": "" for i in range(17)}},
        ({"metadata": {"x": "y" * 513}}, "metadata.x"),
    ),
    *wrong(RESPONSES, RESPOND, "unsupported_parameter", {"previous_response_id": "r"}),
    *wrong(RESPONSES, RESPOND, "context_length_exceeded", ({"max_output_tokens": 10**6}, "input")),
    ("/tokenize", {}, "invalid_value", "prompt"),
    ("/detokenize", {"tokens": [10**9]}, "invalid_value", "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "code", "param"), REFUSED)
def test_what_is_wrong_is_named(server, path, body, code, param):
    answer = server.ask(path, body)
    error = answer.json["error"]
    assert answer.status in (400, 404), answer.content
    assert (error["code"], error["param"]) == (code, param), error["message"]
    assert "\n" not in error["message"]
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 3e38}, {"top_p": 1e-40},
        {"min_p": 1.0}, {"logit_bias": {str(i): -100 for i in range(128)}},
        {"logit_bias": {str(i): -3e38 for i in range(128)}}, {"repetition_penalty": 1e-40},
        {"presence_penalty": 3e38, "frequency_penalty": 3e38}, {"frequency_penalty": -3e38},
        {"top_k": 10**30, "seed": 10**30, "max_tokens": 10},
    ],
    ids=lambda more: str(more)[:40],
)  # fmt: skip
def test_extremes_work(server: Running, more):
    asked = PLAIN | {"temperature": 1.0, "max_tokens": 4, "seed": 1} | more
    answer = server.ask("/v1/completions", asked)
    assert answer.status == 200, answer.content
    if more.get("temperature", 1) < 1:
        tiny, greedy = (server.text("a", "The", temperature=t) for t in (more["temperature"], 0))
        assert tiny == greedy


def test_a_grammar_that_fails_in_a_stream_is_the_requests_fault(server: Running):
    later = {"type": "object", "properties": {"x": SCHEMA}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": later}}
    answer = server.ask(TURNS, CHAT | {"response_format": form, "stream": True})
    error = answer.events[-1]["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "response_format")
    assert len(error["message"]) < 500
    assert 'outcome="not_computed"' not in server.metrics()


def test_harmless_and_neutral_fields_are_accepted(server):
    body = PLAIN | {"user": "me", "best_of": 1, "echo": False, "suffix": None, "metadata": {}}
    assert server.ask("/v1/completions", body | {"max_tokens": 1}).status == 200


@pytest.mark.parametrize("host", ["[", "", "a b", "[::1"])
def test_a_host_that_is_none_is_refused(server: Running, host):
    answer = raw(server, "GET /v1/models HTTP/1.1", host=host)
    assert b" 40" in answer[:14]
    assert b"500" not in answer[:14]
