"""What is refused, and by which name: nothing that changes an answer is left out in silence."""

from __future__ import annotations

import pytest

import lorafold as lf
from serving_cases import Running, raw, running, saved

ASK = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def server(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    adapters = saved(tiny_model_dir("llama"), {"a": lf.LoRA(rank=2)}, folder / "adapters")
    with running(tiny_model_dir("llama"), adapters) as found:
        yield found


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


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (TURNS, CHAT | {"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
        (TURNS, CHAT | {"top_a": 0.5}, "unsupported_parameter", "top_a"),
        (TURNS, CHAT | {"store": True}, "unsupported_parameter", "store"),
        (TURNS, CHAT | {"temperature": -1}, "invalid_value", "temperature"),
        (TURNS, CHAT | {"temperature": "0.5"}, "invalid_value", "temperature"),
        (TURNS, CHAT | {"top_p": 0}, "invalid_value", "top_p"),
        (TURNS, CHAT | {"n": 1000000}, "invalid_value", "n"),
        (TURNS, CHAT | {"n": 0}, "invalid_value", "n"),
        (TURNS, CHAT | {"stop": ["x"] * 10000}, "invalid_value", "stop"),
        (TURNS, CHAT | {"stop": [""]}, "invalid_value", "stop"),
        (TURNS, CHAT | {"max_tokens": -5}, "invalid_value", "max_tokens"),
        (TURNS, CHAT | {"max_tokens": 100000}, "context_length_exceeded", "messages"),
        (TURNS, CHAT | {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        (TURNS, CHAT | {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        (TURNS, CHAT | {"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        (TURNS, CHAT | {"response_format": {"type": "json_object", "schema": {}}},
         "unsupported_parameter", "response_format"),
        (TURNS, CHAT | {"chat_template_kwargs": {"eos_token": "x"}}, "invalid_value", "eos_token"),
        (TURNS, CHAT | {"tool_choice": "required"}, "invalid_value", "tool_choice"),
        (TURNS, CHAT | {"tools": [{"type": "web"}]}, "invalid_value", "tools[0].name"),
        (TURNS, CHAT | {"reasoning_effort": "high"}, "invalid_value", "reasoning_effort"),
        (TURNS, CHAT | {"chat_template_kwargs": {"x": 1}}, "invalid_value", "x"),
        (TURNS, CHAT | {"tools": [{"type": "function", "function": {"name": "x", "parameters": {
            "properties": 5}}}]}, "template_refuses", "messages"),
        (TURNS, CHAT | {"messages": []}, "invalid_value", "messages"),
        (TURNS, CHAT | {"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
        (TURNS, CHAT | {"messages": [{"role": "me", "content": "x"}]}, "invalid_value",
         "messages[0].role"),
        (TURNS, CHAT | {"messages": [{"role": "user", "content": "x", "audio": {"id": 1}}]},
         "unsupported_parameter", "messages[0].audio"),
        (TURNS, {"messages": ASK}, "missing_parameter", "model"),
        (TURNS, CHAT | {"model": "nobody"}, "model_not_found", "model"),
        (TURNS, [1], "invalid_json", None),
        ("/v1/completions", PLAIN | {"prompt": ""}, "invalid_value", "prompt"),
        ("/v1/completions", PLAIN | {"prompt": []}, "invalid_value", "prompt"),
        ("/v1/completions", PLAIN | {"prompt": [300]}, "invalid_value", "prompt"),
        ("/v1/completions", PLAIN | {"prompt": [-1]}, "invalid_value", "prompt"),
        ("/v1/completions", PLAIN | {"prompt": ["x"] * 99}, "invalid_value", "prompt"),
        ("/v1/completions", PLAIN | {"max_tokens": 0, "echo": True}, "invalid_value", "max_tokens"),
        (TURNS, CHAT | {"echo": True}, "unsupported_parameter", "echo"),
        ("/v1/completions", PLAIN | {"suffix": "x"}, "unsupported_parameter", "suffix"),
        ("/v1/completions", PLAIN | {"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ("/v1/completions", PLAIN | {"logit_bias": {"99999": 1}}, "invalid_value", "logit_bias"),
        ("/v1/completions", PLAIN | {"logit_bias": {"5": 1e39}}, "invalid_value", "logit_bias"),
        ("/v1/completions", PLAIN | {"temperature": 1e39}, "invalid_value", "temperature"),
        ("/v1/completions", PLAIN | {"presence_penalty": -1e39}, "invalid_value",
         "presence_penalty"),
        ("/v1/completions", PLAIN | {"repetition_penalty": 0}, "invalid_value",
         "repetition_penalty"),
        (TURNS, CHAT | {"response_format": AMBIGUOUS}, "invalid_value", "response_format"),
        ("/v1/responses", {"model": "a", "input": "x", "text": {"format": AMBIGUOUS_TEXT}},
         "invalid_value", "text.format"),
        ("/v1/responses", {"model": "a", "input": "x", "previous_response_id": "r"},
         "unsupported_parameter", "previous_response_id"),
        ("/v1/responses", {"model": "a", "input": [{"type": "image"}]}, "invalid_value",
         "input[0].type"),
        ("/v1/completions", PLAIN | {"prompt": ["x"] * 4, "n": 3}, "invalid_value", "prompt"),
        (TURNS, CHAT | {"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        (TURNS, CHAT | {"max_tokens": 3, "max_completion_tokens": 5}, "invalid_value",
         "max_tokens"),
        (TURNS, CHAT | {"verbosity": "low"}, "invalid_value", "verbosity"),
        (TURNS, CHAT | {"messages": [ASK[0] | {"name": 5}]}, "invalid_value", "messages[0].name"),
        (TURNS, CHAT | {"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "invalid_value",
         "tool_choice"),
        (TURNS, CHAT | {"response_format": {"type": "json_schema", "schema": {"$ref": "#"}}},
         "invalid_value", "response_format"),
        (TURNS, CHAT | {"response_format": {"type": "json_schema", "schema": CIRCLE}},
         "invalid_value", "response_format"),
        ("/v1/responses", RESPOND | {"text": {"format": "x"}}, "invalid_value", "text.format"),
        ("/v1/responses", RESPOND | {"text": {"format": {"type": "json_schema", "schema": CIRCLE}}},
         "invalid_value", "text.format"),
        ("/v1/responses", RESPOND | {"text": {"format": {"type": "json_schema", "schema": FALSE}}},
         "invalid_value", "text.format"),
        ("/v1/responses", RESPOND | {"text": {"verbosity": "low"}}, "invalid_value",
         "text.verbosity"),
        ("/v1/responses", RESPOND | {"reasoning": {"effort": 5}}, "invalid_value",
         "reasoning.effort"),
        ("/v1/responses", RESPOND | {"input": [{"type": "reasoning", "content": "x"}]},
         "invalid_value", "input[0].content"),
        ("/v1/responses", RESPOND | {"instructions": "x", "input": [ASK[0], {"role": "me",
         "content": "x"}]}, "invalid_value", "input[1].role"),
        ("/v1/responses", RESPOND | {"max_output_tokens": 0}, "invalid_value",
         "max_output_tokens"),
        ("/v1/responses", RESPOND | {"max_output_tokens": 10**6}, "context_length_exceeded",
         "input"),
        ("/v1/responses", RESPOND | {"input": [ASK[0], {"type": "function_call", "call_id": "1",
         "name": "x", "arguments": "y"}]}, "invalid_value", "input[1].arguments"),
        ("/v1/responses", RESPOND | {"reasoning": {"summary": "detailed"}}, "invalid_value",
         "reasoning.summary"),
        ("/v1/responses", RESPOND | {"include": ["x"]}, "invalid_value", "include[0]"),
        ("/v1/responses", RESPOND | {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ("/v1/responses", RESPOND | {"truncation": "some"}, "invalid_value", "truncation"),
        ("/v1/responses", RESPOND | {"metadata": {f"{i}": "" for i in range(17)}},
         "invalid_value", "metadata"),
        ("/v1/responses", RESPOND | {"metadata": {"x": "y" * 513}}, "invalid_value", "metadata.x"),
        ("/tokenize", {}, "invalid_value", "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "invalid_value", "tokens"),
    ],
)  # fmt: skip
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
    metrics = server.ask("/metrics").content.decode()
    assert 'outcome="not_computed"' not in metrics


def test_harmless_and_neutral_fields_are_accepted(server):
    body = PLAIN | {"user": "me", "best_of": 1, "echo": False, "suffix": None, "metadata": {}}
    assert server.ask("/v1/completions", body | {"max_tokens": 1}).status == 200


def test_other_routes_and_types_are_refused(server):
    assert server.ask("/v1/nothing").code == "no_route"
    assert server.ask("/v1/completions").status == 405
    form = {"Content-Type": "text/plain"}
    assert server.ask("/v1/completions", PLAIN, headers=form).code == "unsupported_media_type"


@pytest.mark.parametrize("host", ["[", "", "a b", "[::1"])
def test_a_host_that_is_none_is_refused(server: Running, host):
    answer = raw(server, "GET /v1/models HTTP/1.1", host=host)
    assert b" 40" in answer[:14]
    assert b"500" not in answer[:14]
