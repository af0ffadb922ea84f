"""Anthropic's messages: the same turn as a chat, in its shapes, with its events and its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import lorafold as lf
from conftest import make_model_dir
from lorafold.serving.errors import Refusal
from lorafold.serving.server import Record, error_event
from serving_cases import TOOL_TEMPLATE, Answer, Running, running, saved

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]
CLAUDE = {"model": "a", "messages": ASK, "max_tokens": 60}
USED = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}}
USE = [{"name": "weather", "description": "The weather.", "input_schema": CITY}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A llama with a chat template that shows tools, and one tenant."""
    folder = tmp_path_factory.mktemp("messages")
    model = make_model_dir("llama", folder / "base")
    (model / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    adapters = saved(model, {"a": lf.LoRA(rank=2)}, folder / "adapters")
    with running(model, adapters, keys={"me": ["*"]}) as found:
        yield found


def claude(server: Running, body: Any, path: str = "/v1/messages") -> Answer:
    """As Anthropic's client asks."""
    return server.ask(path, body, headers={"x-api-key": server.keys["me"]})


def test_messages_are_the_same_turn_as_a_chat(server: Running) -> None:
    greedy = CLAUDE | {"temperature": 0, "max_tokens": 9}
    chat = server.ask("/v1/chat/completions", greedy, server.keys["me"]).json
    found = claude(server, greedy).json
    assert found["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert found["stop_reason"] == "max_tokens"
    assert found["usage"]["output_tokens"] == 9
    stop = found["content"][0]["text"][2:4]
    ended = claude(server, greedy | {"stop_sequences": ["never", stop]}).json
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("stop_sequence", stop)
    events = claude(server, greedy | {"stream": True}).events
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert text == found["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 9


def test_messages_call_tools_and_read_their_results(server: Running) -> None:
    calling = CLAUDE | {"tools": USE, "system": [{"type": "text", "text": "Be brief."}]}
    whole = claude(server, calling | {"tool_choice": {"type": "any"}, "max_tokens": 150}).json
    use = whole["content"][0]
    assert (whole["stop_reason"], use["type"], use["name"]) == ("tool_use", "tool_use", "weather")
    named = {"tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 150}
    events = claude(server, calling | named | {"stream": True}).events
    delta = next(e["delta"] for e in events if e["type"] == "content_block_delta")
    assert json.loads(delta["partial_json"])["city"] in ("Rome", "Oslo")
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    part = {"type": "text", "text": "18 degrees", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [part]}
    more = [{"role": "assistant", "content": [use]}]
    more += [{"role": "user", "content": [result, {"type": "text", "text": "And Oslo?"}]}]
    after = calling | {"messages": [*ASK, *more], "max_tokens": 4}
    usage = claude(server, after).json["usage"]
    count = {k: v for k, v in after.items() if k != "max_tokens"}
    counted = claude(server, count, "/v1/messages/count_tokens").json
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    form = {"format": {"type": "json_schema", "schema": CITY}}
    typed = claude(server, CLAUDE | {"output_config": form}).json["content"][0]["text"]
    assert json.loads(typed)["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_tokens": None}, "max_tokens: expected a value"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"max_tokens": 10**6}, "prompt is too long: This model's maximum context length is 512"),
        ({"stop_sequences": [""]}, "stop"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: found 'enabled'"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type: found 'all'"),
        ({"tools": [{"type": "web_search", "name": "web_search"}]}, "tools[0].type: found"),
        ({"tools": [USE[0] | {"input_examples": [{}]}]}, "tools[0].input_examples: it is not"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages[0].content[0].type: found 'image'"),
        ({"messages": [*ASK, {"role": "assistant", "content": "It"}]}, "messages: found the"),
        ({"messages": [*ASK, {"role": "assistant", "content": [USED | {"input": "x"}]}]},
         "messages[1].content[0].input: found no JSON"),
        ({"messages": [*ASK, {"role": "assistant", "content": [USED | {"name": 5}]}]},
         "messages[1].content[0].name: found 5"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]},
         "messages[0].content[0].type: found []"),
        ({"tool_choice": {"type": {}}}, "tool_choice.type: found {}"),
        ({"tools": [USE[0] | {"input_schema": "x"}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema: found 'x'"),
        ({"tools": [USE[0] | {"input_schema": {"properties": 5}}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema: the schema can't be read"),
        ({"system": [{"type": "image"}]}, "system[0]: found a block of type 'image'"),
        ({"output_config": {"effort": "low"}}, "output_config.effort: it is not supported"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"$ref": "#"}}}},
         "output_config.format: found a schema that refers to itself"),
    ],
)  # fmt: skip
def test_messages_are_refused_in_anthropic_s_shape(server: Running, more: Any, said: str) -> None:
    answer = claude(server, CLAUDE | more)
    assert answer.status == 400
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert answer.json["error"]["message"].startswith(said), answer.content


def test_who_may_not_ask_is_told_in_anthropic_s_shape(server: Running) -> None:
    closed = server.ask("/v1/messages", CLAUDE, headers={"x-api-key": "lf-wrong"})
    assert (closed.status, closed.json["error"]["type"]) == (401, "authentication_error")
    nobody = claude(server, CLAUDE | {"model": "nobody"})
    assert (nobody.status, nobody.json["error"]["type"]) == (404, "not_found_error")
    assert claude(server, CLAUDE, "/v1/messages/batches").json["type"] == "error"
    kept = claude(server, CLAUDE | {"thread": {"type": "create"}})
    assert (kept.status, kept.json["error"]["details"]["unsupported"]) == (400, ["thread"])


def test_what_fails_in_a_stream_is_an_event_of_anthropic_s() -> None:
    failed = Refusal(503, "engine_restarted", "the engine ended")
    for path, kind in (("/v1/messages", "error"), ("/v1/responses", None)):
        about, name = error_event(Record("req-1", "POST", path, path), failed)
        assert name == kind
        assert about["error"]["message"] == "the engine ended"
