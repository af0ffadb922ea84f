"""OpenAI's API beyond a chat: tools beside a schema, allowed tools, cut conversations, responses;
and Anthropic's messages: the same turn as a chat, in its shapes, with its events and its errors.
"""

import json
from typing import Any

import openai
import pytest

from lorafold.serving.chat import drop_oldest
from lorafold.serving.refusals import Refusal
from lorafold.serving.server import RequestRecord, error_event
from serving_cases import ASK, CITY, TABLE, TOOL_TEMPLATE, Answer, Running, tool

pytest_plugins = ["serving_fixtures"]
TOOLS = [tool("weather"), tool("clock")]
FORM = {"type": "json_schema", "json_schema": {"name": "table", "schema": TABLE}}


@pytest.fixture(scope="module")
def server(serve) -> Running:
    """With a chat template that shows tools and a verbosity, and one tenant."""
    template = "{% if verbosity %}{{ verbosity }}{% endif %}" + TOOL_TEMPLATE
    return serve(keys={"me": ["*"]}, template=template)


def test_beside_tools_a_schema_leaves_a_call_or_json(client: Any, server: Running) -> None:
    asked: Any = {"model": "a", "messages": ASK, "tools": TOOLS, "response_format": FORM}
    begun = {}
    for first in "{<":
        (token,) = server.parts.registry.base_model.renderer.tokens(first, special=False)
        bias = {str(token): 100}
        begun[first] = client.chat.completions.create(**asked, logit_bias=bias).choices[0]
    assert [choice.finish_reason for choice in begun.values()] == ["stop", "tool_calls"]
    assert json.loads(begun["{"].message.content or "")["people"] in (2, 4)
    call = begun["<"].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    alone: Any = asked | {"tool_choice": "none"}
    found = client.chat.completions.create(**alone).choices[0].message
    assert json.loads(found.content or "")["day"] in ("friday", "sunday")
    forced: Any = asked | {"tool_choice": "required"}
    assert client.chat.completions.create(**forced).choices[0].message.tool_calls


def test_a_wrong_schema_beside_tools_is_named(server: Running) -> None:
    chat = {"model": "a", "messages": ASK, "tools": TOOLS, "tool_choice": "required"}
    parameters = {"type": "object", "properties": {"x": False}, "required": ["x"]}
    function = {"name": "odd", "description": "Odd.", "parameters": parameters}
    odd = [TOOLS[0], {"type": "function", "function": function}]
    wrong = FORM | {"json_schema": {"name": "x", "schema": parameters}}
    flat = [{"type": "function"} | tool["function"] for tool in odd]
    cases: list[tuple[str, Any, str]] = [
        ("chat/completions", chat | {"tools": odd}, "tools[1].function.parameters"),
        ("chat/completions", chat | {"tool_choice": "auto", "response_format": wrong},
         "response_format"),
        ("responses", {"model": "a", "input": ASK, "tools": flat, "tool_choice": "required"},
         "tools[1].parameters"),
    ]  # fmt: skip
    for path, body, field in cases:
        error = server.ask(f"/v1/{path}", body, server.keys["me"]).json["error"]
        assert error["param"] == field
        assert error["message"].startswith(f"{field}: ")


def test_allowed_tools_are_shown_and_called_alone(client: Any) -> None:
    chat: Any = {"model": "a", "messages": ASK, "tools": TOOLS}
    inner = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": inner}
    found = client.chat.completions.create(**chat, tool_choice=choice)
    assert found.choices[0].message.tool_calls[0].function.name == "clock"
    flat: Any = [{"type": "function"} | tool["function"] for tool in TOOLS]
    named: Any = {"type": "allowed_tools", "mode": "auto"}
    named["tools"] = [{"type": "function", "name": "clock"}]
    asked: Any = {"model": "a", "input": "Hello", "max_output_tokens": 4, "tools": flat}
    both = client.responses.create(**asked)
    one = client.responses.create(**asked, tool_choice=named)
    assert one.usage.input_tokens < both.usage.input_tokens
    assert one.tool_choice.type == "allowed_tools"
    named["tools"][0]["name"] = "nobody"
    with pytest.raises(openai.BadRequestError, match="nobody"):
        client.responses.create(**asked, tool_choice=named)


def test_the_length_is_told_in_the_words_that_clients_know(client: Any) -> None:
    long: Any = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as error:
        client.chat.completions.create(model="a", messages=long, max_tokens=20)
    assert "in the messages, 20 in the completion" in error.value.message
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="in the prompt, 9000 in the") as error:
        client.completions.create(model="a", prompt="x", max_tokens=9000)
    assert error.value.param == "prompt"


def test_a_response_leaves_the_oldest_out_where_it_may(client: Any) -> None:
    old: Any = [{"role": "user", "content": "y" * 100}, {"role": "assistant", "content": "z" * 90}]
    items: Any = [*old * 3, *ASK]
    asked: Any = {"model": "a", "instructions": "Be brief.", "max_output_tokens": 30}
    with pytest.raises(openai.BadRequestError, match="maximum context length") as error:
        client.responses.create(input=items, **asked)
    assert error.value.param == "input"
    cut = client.responses.create(input=items, truncation="auto", **asked)
    fewer = client.responses.create(input=items[2:], **asked)
    assert cut.truncation == "auto"
    assert cut.usage.input_tokens == fewer.usage.input_tokens
    given = {"model": "a", "input": items[2:], "instructions": "Be brief."}
    counted = client.responses.input_tokens.count(**given)
    assert counted.input_tokens == fewer.usage.input_tokens


def test_exchanges_go_as_a_whole_and_the_last_stays() -> None:
    calls = ["assistant", "tool"]
    roles = ["system", "user", *calls, "user", *calls, *calls]
    messages: list[Any] = [{"role": role, "at": i} for i, role in enumerate(roles)]
    left = [
        [m["at"] for m in drop_oldest(messages, lambda some, n=n: len(some) <= n)]  # type: ignore
        for n in range(len(roles), 0, -1)
    ]
    assert left == [list(range(9)), *[[0, 4, 5, 6, 7, 8]] * 3, *[[0, 4, 7, 8]] * 5]


def test_responses_have_log_probabilities_metadata_and_verbosity(client: Any) -> None:
    asked: Any = {"model": "a", "input": "Hello", "max_output_tokens": 6, "temperature": 0}
    asked["include"] = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    likely = asked | {"top_logprobs": 2, "metadata": {"for": "me"}}
    found: Any = client.responses.create(**likely)
    assert found.metadata == {"for": "me"}
    one = found.output[0].content[0]
    assert b"".join(bytes(x.bytes) for x in one.logprobs).decode(errors="replace") == one.text
    assert all(len(x.top_logprobs) == 2 for x in one.logprobs)
    events = list(client.responses.create(**likely, stream=True))
    done = next(e for e in events if e.type == "response.output_text.done")
    deltas = [x for e in events if e.type == "response.output_text.delta" for x in e.logprobs]
    assert [x.token for x in deltas] == [x.token for x in done.logprobs]
    assert [x.token for x in done.logprobs] == [x.token for x in one.logprobs]
    last = events[-1].response.output[0].content[0]
    assert [x.token for x in last.logprobs] == [x.token for x in one.logprobs]
    low: Any = client.responses.create(**asked, text={"verbosity": "low"})
    assert low.usage.input_tokens > found.usage.input_tokens
    assert low.text.verbosity == "low"


def test_json_has_one_blank_at_most_unless_its_schema_says_otherwise(server: Running) -> None:
    line, blank = server.parts.registry.base_model.renderer.tokens("\n ", special=False)
    body = {"model": "a", "messages": ASK, "max_tokens": 90, "temperature": 0}
    body["logit_bias"] = {str(line): 100, str(blank): 50}

    def said(form: Any) -> str:
        answer = server.ask("/v1/chat/completions", body | {"response_format": form}, key)
        return answer.json["choices"][0]["message"]["content"]

    key = server.keys["me"]
    assert json.loads(said(FORM))
    assert said(FORM).replace(" ", "").count("\n") == 0
    assert said(FORM).startswith('{"day": "')
    free = TABLE | {"x-guidance": {"whitespace_flexible": True}}
    assert said({"type": "json_schema", "json_schema": {"schema": free}}).count("\n") > 40
    called = body | {"tools": TOOLS[:1], "tool_choice": "required"}
    message = server.ask("/v1/chat/completions", called, key).json["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "weather"


CLAUDE = {"model": "a", "messages": ASK, "max_tokens": 60}
USED = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}}
USE = [{"name": "weather", "description": "The weather.", "input_schema": CITY}]


def claude(server: Running, body: Any, path: str = "/v1/messages") -> Answer:
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
        ({"max_tokens": None}, "max_tokens: this field is required"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"max_tokens": 10**6}, "prompt is too long: This model's maximum context length is 512"),
        ({"stop_sequences": [""]}, "stop"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: found 'enabled'"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type: found 'all'"),
        ({"tools": [{"type": "web_search", "name": "web_search"}]}, "tools[0].type: found"),
        ({"tools": [USE[0] | {"input_examples": [{}]}]}, "tools[0].input_examples: this field"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages[0].content[0].type: 'image' is not supported"),
        ({"messages": [*ASK, {"role": "assistant", "content": "It"}]}, "messages: found an"),
        ({"messages": [*ASK, {"role": "assistant", "content": [USED | {"input": "x"}]}]},
         "messages[1].content[0].input: found text that is not JSON"),
        ({"messages": [*ASK, {"role": "assistant", "content": [USED | {"name": 5}]}]},
         "messages[1].content[0].name: found 5"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]},
         "messages[0].content[0].type: [] is not supported"),
        ({"tool_choice": {"type": {}}}, "tool_choice.type: found {}"),
        ({"tools": [USE[0] | {"input_schema": "x"}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema: found 'x'"),
        ({"tools": [USE[0] | {"input_schema": {"properties": 5}}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema: the schema can't be compiled"),
        ({"system": [{"type": "image"}]}, "system[0]: found a block of type 'image'"),
        ({"output_config": {"effort": "low"}}, "output_config.effort: this field is not supported"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"$ref": "#"}}}},
         "output_config.format: found a schema that requires itself"),
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
        about, name = error_event(RequestRecord("req-1", "POST", path, path), failed)
        assert name == kind
        assert about["error"]["message"] == "the engine ended"
