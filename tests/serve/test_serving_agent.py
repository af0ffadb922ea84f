"""Real clients and an agent framework, in loops of calls, results and answers, under an adapter
that learns here to call functions.
"""

import asyncio
import functools
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

import lorafold as lf
from agent_cases import FUNCTIONS, SAYS, TOOLS, question, rows
from serving_cases import Running, running

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.slow
Call = tuple[str, dict[str, Any]]
KINDS = ("OpenAIChatModel", "OpenAIResponsesModel")


class Booking(BaseModel):
    """A table."""

    place: str
    people: int


@pytest.fixture(scope="module")
def server(tmp_path_factory, smollm2) -> Iterator[Running]:
    """The embedded model in the storage that suits the machine, and the adapter `calls`."""
    adapters = tmp_path_factory.mktemp("agent") / "adapters"
    recipe = lf.Recipe(chat_template="tools", steps=40, batch=2, dropout=0.0, storage="auto")
    began = time.perf_counter()
    data = rows("train", 80, seed=0)
    lf.train(recipe, data=data, model="smollm2", out=adapters / "calls")
    print(f"trained in {time.perf_counter() - began:.0f} s")
    with running(smollm2, adapters, storage="auto") as found:
        assert not found.parts.registry.rejected
        yield found


@pytest.fixture(scope="module")
def base(server: Running) -> str:
    return server.parts.registry.base


@pytest.fixture(scope="module")
def asynchronous(server: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def model_of(server: Running, kind: str = KINDS[0]) -> Any:
    """The adapter as pydantic-ai has it; its client belongs to one event loop."""
    models = pytest.importorskip("pydantic_ai.models.openai")
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    return getattr(models, kind)("calls", provider=provider, settings={"temperature": 0.0})


def agent_of(server: Running, kind: str = KINDS[0], **more: Any) -> tuple[Any, list[Call]]:
    """An agent with all functions, and the calls that reach them."""
    pydantic_ai = pytest.importorskip("pydantic_ai")
    called: list[Call] = []

    def watched(function: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(function)
        def watching(**arguments: Any) -> str:
            called.append((function.__name__, arguments))
            return function(**arguments)

        return watching

    tools = [watched(function) for function in FUNCTIONS.values()]
    return pydantic_ai.Agent(model_of(server, kind), tools=tools, **more), called


def unseen(n: int, seed: int) -> Iterator[tuple[str, Call, str]]:
    """Questions with words that no training row has, the call of each, and the answer."""
    rng = random.Random(seed)
    for i in range(n):
        name = list(FUNCTIONS)[i % len(FUNCTIONS)]
        asked, arguments = question(rng, "test", name)
        yield asked, (name, arguments), said(name, arguments)


def said(name: str, arguments: dict[str, Any]) -> str:
    return SAYS[name].format(result=FUNCTIONS[name](**arguments), **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_calls_and_answers_with_the_result(server, kind):
    agent, called = agent_of(server, kind)
    history: list[Any] = []
    for n, (asked, call, answer) in enumerate(unseen(6, seed=1)):
        called.clear()
        found = agent.run_sync(asked, message_history=history if n < 3 else None)
        print(f"{asked!r} -> {called} -> {found.output!r}")
        assert called == [call]
        assert found.output == answer
        history = found.all_messages() if n < 3 else history
    assert len(history) == 12  # a question, a call, its result and an answer each
    called.clear()
    assert agent.run_sync("Hello").output.startswith("Hello")
    assert called == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_streams(server, kind):
    agent, called = agent_of(server, kind, system_prompt="Be brief.")

    async def ask(asked: str) -> list[str]:
        async with agent.run_stream(asked) as stream:
            return [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]

    async def all_of_them() -> None:
        for asked, call, answer in unseen(3, seed=2):
            called.clear()
            pieces = await ask(asked)
            assert called == [call]
            assert "".join(pieces) == answer
            assert len(pieces) > 3

    asyncio.run(all_of_them())


def test_an_agent_that_has_to_answer_in_a_form(server):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    asked, wanted = "Book a table for 4 at The Wild Pear", Booking(place="The Wild Pear", people=4)
    by_tool = pydantic_ai.Agent(model_of(server), output_type=Booking)
    assert by_tool.run_sync(asked).output == wanted
    by_schema = pydantic_ai.Agent(model_of(server), output_type=pydantic_ai.NativeOutput(Booking))
    assert isinstance(by_schema.run_sync(asked).output, Booking)


def called_in(message: Any) -> list[Call]:
    calls = message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def results(calls: list[Any]) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "tool_call_id": call.id,
         "content": FUNCTIONS[call.function.name](**json.loads(call.function.arguments))}
        for call in calls
    ]  # fmt: skip


def fields(messages: list[Any], **more: Any) -> dict[str, Any]:
    return {"model": "calls", "messages": messages, "tools": TOOLS, "temperature": 0} | more


def test_the_asynchronous_client_in_loops_at_once(asynchronous):
    async def loop(asked: str, call: Call, answer: str) -> None:
        messages: list[Any] = [{"role": "user", "content": asked}]
        create = asynchronous.chat.completions.create
        first = (await create(**fields(messages))).choices[0]
        assert (first.finish_reason, called_in(first.message)) == ("tool_calls", [call])
        messages += [first.message, *results(first.message.tool_calls)]
        last = (await create(**fields(messages))).choices[0]
        assert (last.finish_reason, last.message.content) == ("stop", answer)

    async def all_of_them() -> None:
        await asyncio.gather(*(loop(*one) for one in unseen(6, seed=5)))

    asyncio.run(all_of_them())


def test_the_client_puts_streamed_calls_together(client):
    asked = "Compare the weather in Lake Harford and Port Velmere"
    messages: list[Any] = [{"role": "user", "content": asked}]
    calls: dict[int, dict[str, str]] = {}
    finish = None
    for chunk in client.chat.completions.create(**fields(messages, stream=True)):
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        for delta in choice.delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += delta.id or ""
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    assert finish == "tool_calls"
    cities = [json.loads(call["arguments"])["city"] for call in calls.values()]
    assert cities == ["Lake Harford", "Port Velmere"]
    with client.chat.completions.stream(**fields(messages)) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [arguments["city"] for _, arguments in called_in(message)] == cities
    assert len({call.id for call in message.tool_calls}) == 2
    messages += [message.to_dict(), *results(message.tool_calls)]
    pieces = client.chat.completions.create(**fields(messages, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == " ".join(said("get_weather", {"city": city}) for city in cities)
    one = client.chat.completions.create(**fields(messages[:1], parallel_tool_calls=False))
    assert called_in(one.choices[0].message) == [("get_weather", {"city": cities[0]})]


def test_the_choice_of_tools(client, base):
    asked, call, _ = next(unseen(1, seed=6))
    messages = [{"role": "user", "content": asked}]

    def calls(**more: Any) -> list[Call]:
        found = client.chat.completions.create(**fields(messages, **more))
        return called_in(found.choices[0].message)

    assert calls() == calls(tool_choice="auto") == calls(tool_choice="required") == [call]
    named = {"type": "function", "function": {"name": "book_table"}}
    ((name, arguments),) = calls(tool_choice=named)
    assert name == "book_table"
    assert set(arguments) == {"place", "people"}
    assert calls(tool_choice="none") == []
    hello = fields([{"role": "user", "content": "Hello"}])
    assert not client.chat.completions.create(**hello).choices[0].message.tool_calls
    forced = client.chat.completions.create(**hello | {"tool_choice": "required"})
    assert len(called_in(forced.choices[0].message)) == 1
    with pytest.raises(openai.BadRequestError, match="tools"):  # its own template shows none
        client.chat.completions.create(**fields(messages, model=base))


def test_responses_in_a_loop(client):
    tools: Any = [{"type": "function"} | tool["function"] for tool in TOOLS]
    for streamed, (asked, (name, arguments), answer) in enumerate(unseen(2, seed=7)):
        items: list[Any] = [{"role": "user", "content": asked}]
        ask: Any = {"model": "calls", "tools": tools, "temperature": 0}

        def respond(items: list[Any], ask: Any = ask, streamed: int = streamed) -> Any:
            if not streamed:
                return client.responses.create(input=items, **ask)
            with client.responses.stream(input=items, **ask) as stream:
                return stream.get_final_response()

        first = respond(items)
        (call,) = first.output
        assert (call.name, json.loads(call.arguments)) == (name, arguments)
        result = FUNCTIONS[name](**arguments)
        output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
        assert respond([*items, *first.output, output]).output_text == answer
