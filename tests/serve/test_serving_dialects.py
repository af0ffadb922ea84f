"""What clients of OpenAI's API ask for beyond a chat: tools beside a schema, tools that are
allowed, conversations that are cut, and what responses have; and JSON without line breaks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import lorafold as lf
from conftest import make_model_dir
from lorafold.serving.chat import shortened
from serving_cases import TOOL_TEMPLATE, Running, running, saved

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": n, "description": f"A {n}.", "parameters": CITY}}
    for n in ("weather", "clock")
]
SCHEMA = {
    "type": "object",
    "properties": {"day": {"enum": ["friday", "sunday"]}, "people": {"enum": [2, 4]}},
    "required": ["day", "people"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "table", "schema": SCHEMA}}
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A llama with a chat template that shows tools and knows a verbosity, and one tenant."""
    folder = tmp_path_factory.mktemp("dialects")
    model = make_model_dir("llama", folder / "base")
    template = "{% if verbosity %}{{ verbosity }}{% endif %}" + TOOL_TEMPLATE
    (model / "chat_template.jinja").write_text(template)
    adapters = saved(model, {"a": lf.LoRA(rank=2)}, folder / "adapters")
    with running(model, adapters, keys={"me": ["*"]}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    key = server.keys["me"]
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_beside_tools_a_schema_leaves_a_call_or_json(
    client: openai.OpenAI, server: Running
) -> None:
    asked: Any = {"model": "a", "messages": ASK, "tools": TOOLS, "response_format": FORM}
    begun = {}
    for first in "{<":
        (token,) = server.parts.registry.plain.renderer.tokens(first, special=False)
        bias = {str(token): 100}
        begun[first] = client.chat.completions.create(**asked, logit_bias=bias).choices[0]
    assert {k: choice.finish_reason for k, choice in begun.items()} == {
        "{": "stop", "<": "tool_calls",
    }  # fmt: skip
    assert json.loads(begun["{"].message.content or "")["people"] in (2, 4)
    call: Any = begun["<"].message.tool_calls[0]  # type: ignore
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


def test_allowed_tools_are_shown_and_called_alone(client: openai.OpenAI) -> None:
    chat: Any = {"model": "a", "messages": ASK, "tools": TOOLS}
    inner = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": inner}
    found = client.chat.completions.create(**chat, tool_choice=choice)
    assert found.choices[0].message.tool_calls[0].function.name == "clock"  # type: ignore
    flat: Any = [{"type": "function"} | tool["function"] for tool in TOOLS]
    named: Any = {"type": "allowed_tools", "mode": "auto"}
    named["tools"] = [{"type": "function", "name": "clock"}]
    asked: Any = {"model": "a", "input": "Hello", "max_output_tokens": 4, "tools": flat}
    both = client.responses.create(**asked)
    one = client.responses.create(**asked, tool_choice=named)
    assert one.usage.input_tokens < both.usage.input_tokens  # type: ignore
    assert one.tool_choice.type == "allowed_tools"  # type: ignore
    named["tools"][0]["name"] = "nobody"
    with pytest.raises(openai.BadRequestError, match="nobody"):
        client.responses.create(**asked, tool_choice=named)


def test_the_length_is_told_in_the_words_that_clients_know(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as error:
        client.chat.completions.create(model="a", messages=long, max_tokens=20)
    assert "in the messages, 20 in the completion" in error.value.message
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="in the prompt, 9000 in the") as error:
        client.completions.create(model="a", prompt="x", max_tokens=9000)
    assert error.value.param == "prompt"


def test_a_response_leaves_the_oldest_out_where_it_may(client: openai.OpenAI) -> None:
    old: Any = [{"role": "user", "content": "y" * 100}, {"role": "assistant", "content": "z" * 90}]
    items: Any = [*old * 3, *ASK]
    asked: Any = {"model": "a", "instructions": "Be brief.", "max_output_tokens": 30}
    with pytest.raises(openai.BadRequestError, match="maximum context length") as error:
        client.responses.create(input=items, **asked)
    assert error.value.param == "input"
    cut = client.responses.create(input=items, truncation="auto", **asked)
    fewer = client.responses.create(input=items[2:], **asked)
    assert cut.truncation == "auto"
    assert cut.usage.input_tokens == fewer.usage.input_tokens  # type: ignore
    counted = client.responses.input_tokens.count(
        model="a", input=items[2:], instructions="Be brief."
    )
    assert counted.input_tokens == fewer.usage.input_tokens  # type: ignore


def test_exchanges_go_as_a_whole_and_the_last_stays() -> None:
    calls = ["assistant", "tool"]
    roles = ["system", "user", *calls, "user", *calls, *calls]
    messages: list[Any] = [{"role": role, "at": i} for i, role in enumerate(roles)]
    left = [
        [m["at"] for m in shortened(messages, lambda some, n=n: len(some) <= n)]  # type: ignore
        for n in range(len(roles), 0, -1)
    ]
    assert left == [list(range(9)), *[[0, 4, 5, 6, 7, 8]] * 3, *[[0, 4, 7, 8]] * 5]


def test_responses_have_log_probabilities_metadata_and_verbosity(client: openai.OpenAI) -> None:
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
    """A bias for line breaks, to which a small model tends by itself, does nothing."""
    line, blank = server.parts.registry.plain.renderer.tokens("\n ", special=False)
    body = {"model": "a", "messages": ASK, "max_tokens": 90, "temperature": 0}
    body["logit_bias"] = {str(line): 100, str(blank): 50}

    def said(form: Any) -> str:
        answer = server.ask("/v1/chat/completions", body | {"response_format": form}, key)
        return answer.json["choices"][0]["message"]["content"]

    key = server.keys["me"]
    assert json.loads(said(FORM))
    assert said(FORM).replace(" ", "").count("\n") == 0
    assert said(FORM).startswith('{"day": "')
    free = SCHEMA | {"x-guidance": {"whitespace_flexible": True}}
    assert said({"type": "json_schema", "json_schema": {"schema": free}}).count("\n") > 40
    called = body | {"tools": TOOLS[:1], "tool_choice": "required"}
    message = server.ask("/v1/chat/completions", called, key).json["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "weather"
