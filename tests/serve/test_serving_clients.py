"""Clients of OpenAI's and Anthropic's APIs, each with what it can do over a text model.

The model is a random one: grammars hold its calls and its JSON. A client that is not installed is
skipped; `pip install lorafold[dev,clients]` has them.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

import lorafold as lf
from conftest import make_model_dir
from serving_cases import ASK, CITY, TOOL_TEMPLATE, Running, running, saved, tool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the clients' own, which are no matter of ours
]
TOOL = tool()
LONG = [{"role": "user", "content": "x" * 5000}]
OVER = "maximum context length"


class Table(BaseModel):
    """A table."""

    model_config = ConfigDict(extra="forbid")  # nothing further that a random model would write

    day: Literal["friday", "sunday"]
    people: Literal[2, 4]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A random llama of 4096 positions, whose chat template shows tools."""
    folder = tmp_path_factory.mktemp("clients")
    model = make_model_dir("llama", folder / "base")
    (model / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    with running(model, saved(model, {"a": lf.LoRA(rank=2)}, folder / "adapters")) as found:
        yield found


@pytest.fixture(scope="module")
def url(server: Running) -> str:
    return f"{server.url}/v1"


def test_openai(url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chats: Any = client.chat.completions
    parsed = chats.parse(model="a", messages=ASK, response_format=Table, tools=[])
    assert isinstance(parsed.choices[0].message.parsed, Table)
    tools = [openai.pydantic_function_tool(Table)]
    called = chats.parse(model="a", messages=ASK, tools=tools, tool_choice="required")
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Table)
    either = chats.parse(model="a", messages=ASK, tools=tools, response_format=Table)
    message = either.choices[0].message
    assert message.parsed or message.tool_calls[0].function.parsed_arguments
    with chats.stream(model="a", messages=ASK, response_format=Table) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Table)
    with pytest.raises(openai.BadRequestError, match=OVER) as error:
        chats.create(model="a", messages=LONG)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")


def test_openai_responses(url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    parsed: Any = client.responses.parse(model="a", input="Hello", text_format=Table)
    assert isinstance(parsed.output_parsed, Table)
    asked: Any = {"model": "a", "input": "Hello", "top_logprobs": 2}
    asked["include"] = ["message.output_text.logprobs"]
    with client.responses.stream(**asked) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert kinds[0] == "response.created"
    logprobs = final.output[0].content[0].logprobs
    assert all(len(one.top_logprobs) == 2 for one in logprobs)
    count = client.responses.input_tokens.count(model="a", input="Hello").input_tokens
    assert count == final.usage.input_tokens
    long: Any = [{"role": "user", "content": "x" * 1000}, *ASK] * 5
    with pytest.raises(openai.BadRequestError, match=OVER) as error:
        client.responses.create(model="a", input=long)
    assert error.value.param == "input"
    cut = client.responses.create(model="a", input=long, truncation="auto", max_output_tokens=4)
    assert cut.truncation == "auto"


@pytest.mark.parametrize("kind", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_openai_agents(url: str, kind: str) -> None:
    agents: Any = pytest.importorskip("agents")
    import openai

    agents.set_tracing_disabled(True)
    asked: list[str] = []

    @agents.function_tool
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city."""
        asked.append(city)
        return "18 degrees"

    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            model = getattr(agents, kind)("a", openai_client=client)
            settings = agents.ModelSettings(tool_choice="required")
            agent = agents.Agent("guide", tools=[weather], model=model, model_settings=settings)
            found = await agents.Runner.run(agent, "What is the weather in Rome?")
            assert asked
            items = [item.type for item in found.new_items]
            assert items[:2] == ["tool_call_item", "tool_call_output_item"]
            await agents.Runner.run(agent, [*found.to_input_list(), *ASK])
            # without a turn of text, which a random model may not end and the client then refuses
            calling = agent.clone(tool_use_behavior="stop_on_first_tool")
            streamed = agents.Runner.run_streamed(calling, "What is the weather in Rome?")
            kinds = {event.type async for event in streamed.stream_events()}
            assert {"raw_response_event", "run_item_stream_event"} <= kinds
            # a schema beside tools, as an agent with an output type has it
            typed = agents.Agent("typed", tools=[weather], model=model, output_type=Table)
            assert isinstance((await agents.Runner.run(typed, "Hello")).final_output, Table)
            told = agents.ModelSettings(top_logprobs=2, verbosity="medium")
            plain = agents.Agent("plain", model=model, model_settings=told)
            await agents.Runner.run(plain, "Hello")

    asyncio.run(talk())


def test_litellm(url: str, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its prices are not fetched
    litellm: Any = pytest.importorskip("litellm")
    asked = {"model": "openai/a", "api_base": url, "api_key": "none", "num_retries": 0}
    found = litellm.completion(messages=ASK, max_tokens=8, **asked)
    assert found.usage.completion_tokens <= 8
    chunks = litellm.completion(messages=ASK, max_tokens=8, stream=True, **asked)
    whole = litellm.stream_chunk_builder(list(chunks))
    assert whole.choices[0].finish_reason in ("stop", "length")
    called = litellm.completion(messages=ASK, tools=[TOOL], tool_choice="required", **asked)
    call = called.choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    told = [*ASK, called.choices[0].message.model_dump(), result]
    litellm.completion(messages=told, tools=[TOOL], max_tokens=8, **asked)
    typed = litellm.completion(messages=ASK, response_format=Table, **asked)
    Table.model_validate_json(typed.choices[0].message.content)
    likely = {"max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    assert litellm.completion(messages=ASK, **likely, **asked).choices[0].logprobs.content
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=LONG, **asked)
    text = litellm.text_completion(prompt="The", max_tokens=4, **asked)
    assert text.choices[0].finish_reason in ("stop", "length")
    answer = litellm.responses(input="Hello", max_output_tokens=16, **asked)
    assert answer.usage.output_tokens <= 16
    claude = {"model": "anthropic/a", "api_base": server.url, "api_key": "none"}
    found = litellm.completion(messages=ASK, max_tokens=8, **claude)
    assert found.usage.completion_tokens <= 8
    calling = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 100}
    called = litellm.completion(messages=ASK, **calling, **claude)
    assert called.choices[0].message.tool_calls[0].function.name == "weather"

    async def talk() -> None:
        found = await litellm.acompletion(messages=ASK, max_tokens=4, **asked)
        assert found.usage.prompt_tokens > 0

    asyncio.run(talk())


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(url: str, responses: bool) -> None:
    langchain: Any = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    given = {"base_url": url, "api_key": "none", "max_retries": 0, "stream_usage": True}
    model = langchain.ChatOpenAI(model="a", use_responses_api=responses, **given)
    short = model.bind(max_tokens=8)
    assert short.invoke("Hello").usage_metadata["output_tokens"] <= 8
    pieces = list(short.stream("Hello"))
    assert sum(pieces[1:], pieces[0]).usage_metadata["output_tokens"] <= 8
    called = model.bind_tools([TOOL], tool_choice="any").invoke("What is the weather in Rome?")
    assert called.tool_calls[0]["name"] == "weather"
    asked = HumanMessage("What is the weather in Rome?", name="bob")
    result = ToolMessage("18 degrees", tool_call_id=called.tool_calls[0]["id"])
    model.bind_tools([TOOL]).bind(max_tokens=8).invoke([asked, called, result])
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Table, method=method).invoke("Book a table in JSON")
        assert isinstance(found, Table)
    with pytest.raises(Exception, match=OVER):
        model.invoke("x" * 5000)


def test_langchain_logprobs_and_completions(url: str) -> None:
    langchain: Any = pytest.importorskip("langchain_openai")
    given = {"model": "a", "base_url": url, "api_key": "none", "max_retries": 0}
    told = langchain.ChatOpenAI(**given, logprobs=True, top_logprobs=2, max_tokens=4)
    assert told.invoke("Hello").response_metadata["logprobs"]["content"]
    assert asyncio.run(told.ainvoke("Hello")).usage_metadata["output_tokens"] <= 4
    plain = langchain.OpenAI(**given, max_tokens=4)
    assert isinstance(plain.invoke("The"), str)


def test_instructor(url: str) -> None:
    instructor: Any = pytest.importorskip("instructor")
    import openai

    given: Any = {"model": "a", "messages": ASK, "response_model": Table, "max_retries": 0}
    openai_client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"):
        client = instructor.from_openai(openai_client, mode=instructor.Mode[mode])
        assert isinstance(client.chat.completions.create(**given), Table), mode
    client = instructor.from_openai(openai_client)
    *_, last = client.create_partial(**given)
    assert last.people in (2, 4)


def test_instructor_with_anthropic(server: Running) -> None:
    instructor: Any = pytest.importorskip("instructor")
    anthropic: Any = pytest.importorskip("anthropic")
    plain = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    client = instructor.from_anthropic(plain)
    given: Any = {"model": "a", "messages": ASK, "response_model": Table, "max_retries": 0}
    assert isinstance(client.chat.completions.create(**given, max_tokens=200), Table)


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(url: str, kind: str) -> None:
    pydantic_ai: Any = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent(**more: Any) -> Any:
        provider = OpenAIProvider(base_url=url, api_key="none")
        model = getattr(models, kind)("a", provider=provider)
        return pydantic_ai.Agent(model, **more)

    for output in (pydantic_ai.NativeOutput(Table), Table):
        assert isinstance(agent(output_type=output).run_sync("A table").output, Table)
    asked: list[str] = []

    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city."""
        asked.append(city)
        return "18 degrees"

    # its tools and its output are both tools, of which one has to be called
    found = agent(output_type=Table, tools=[weather]).run_sync("A table")
    assert isinstance(found.output, Table)

    async def talk() -> None:
        async with agent(model_settings={"max_tokens": 8}).run_stream("Hello") as stream:
            await stream.get_output()

    asyncio.run(talk())


def test_anthropic(server: Running) -> None:
    anthropic: Any = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked: Any = {"model": "a", "messages": ASK, "max_tokens": 8, "system": "Be brief."}
    greedy: Any = {"extra_body": {"temperature": 0}}  # which newer versions have no name for
    found = client.messages.create(**asked, **greedy)
    assert found.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(**asked, **greedy) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text == found.content[0].text
    assert final.stop_reason == found.stop_reason
    assert final.usage.output_tokens == found.usage.output_tokens
    tool = {"name": "weather", "description": "The weather.", "input_schema": CITY}
    calling = asked | {"tools": [tool], "max_tokens": 200}
    called = client.messages.create(**calling, tool_choice={"type": "any"})
    use = called.content[0]
    assert (called.stop_reason, use.name) == ("tool_use", "weather")
    with client.messages.stream(**calling, tool_choice={"type": "tool", "name": "weather"}) as s:
        assert s.get_final_message().content[0].input["city"] in ("Rome", "Oslo")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "18 degrees"}
    told = [*ASK, {"role": "assistant", "content": called.content}]
    told += [{"role": "user", "content": [result, {"type": "text", "text": "And Oslo?"}]}]
    count = client.messages.count_tokens(model="a", messages=told, tools=[tool]).input_tokens
    after = client.messages.create(model="a", messages=told, tools=[tool], max_tokens=4)
    assert after.usage.input_tokens + after.usage.cache_read_input_tokens == count
    parsed = client.messages.parse(**asked | {"max_tokens": 100}, output_format=Table)
    assert isinstance(parsed.parsed_output, Table)
    seen: list[str] = []

    @anthropic.beta_tool(name="weather", description="The weather.", input_schema=CITY)
    def weather(city: str) -> str:
        seen.append(city)
        return "18 degrees"

    run = {"tools": [weather], "tool_choice": {"type": "any"}, "max_tokens": 200}
    turns = list(client.beta.messages.tool_runner(**asked | run, max_iterations=2))
    assert len(turns) == 2
    assert seen
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="a", messages=LONG, max_tokens=4)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**asked | {"model": "nobody"})
    assert {model.id for model in client.models.list()} == {"base", "a"}

    async def talk() -> None:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none") as client:
            many = [client.messages.create(**asked) for _ in range(4)]
            assert len(await asyncio.gather(*many)) == 4

    asyncio.run(talk())
