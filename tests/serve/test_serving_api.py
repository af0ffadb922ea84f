"""The API, as the `openai` package sees it: every answer has to be of that package's types."""

import json
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

import lorafold as lf
from fresh_models import fresh_model
from serving_cases import ASK, TOOL_TEMPLATE, Running, tool

pytest_plugins = ["serving_fixtures"]
PROMPT = "Book a table <|im_end|> for four at the Copper Lantern, naïve 日."


@pytest.fixture(scope="module")
def server(serve) -> Running:
    return serve({"a": lf.LoRA(rank=2), "b": lf.DoRA()}, template=TOOL_TEMPLATE)


def test_models_are_the_base_and_its_adapters(client, server):
    listed = client.models.list().data
    assert [m.id for m in listed] == ["base", "a", "b"]
    a: Any = client.models.retrieve("a")
    assert (a.parent, a.method, a.rank, a.state) == ("base", "lora", 2, "resident")
    assert a.digest == server.parts.registry.adapters["a"].digest
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_a_stream_has_the_text_of_the_whole_answer(client, model):
    asked: Any = {
        "model": model, "messages": ASK, "temperature": 0, "max_completion_tokens": 12,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert len({c.id for c in chunks}) == 1


def test_adapters_differ_from_the_base_and_from_each_other(server):
    texts = {m: server.text(m, "The quick brown", max_tokens=16) for m in ("base", "a", "b")}
    assert len(set(texts.values())) == 3
    digest = server.parts.registry.adapters["a"].digest
    assert server.text(f"a@{digest[:12]}", "The quick brown", max_tokens=16) == texts["a"]
    assert server.complete("a@" + "0" * 12, "The").code == "model_not_found"


def test_choices_have_seeds_of_their_own_that_repeat(client):
    asked: Any = {
        "model": "a", "prompt": ["The", "A dog"], "n": 2, "seed": 7, "max_tokens": 8,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    assert first.usage.completion_tokens == 32
    assert client.completions.create(**asked | {"seed": 8}).choices[0].text != texts[0]


def test_tokens_go_in_and_come_out(client, server):
    found = server.ask("/tokenize", {"prompt": "The quick brown", "return_token_strs": True}).json
    assert "".join(found["token_strs"]) == "The quick brown"
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 512
    back = server.ask("/detokenize", {"tokens": found["tokens"]}).json
    assert back == {"prompt": "The quick brown"}
    asked = {"max_tokens": 5, "return_token_ids": True}
    text = server.complete("a", "The quick brown", **asked).json["choices"][0]
    ids = server.complete("a", found["tokens"], **asked).json["choices"][0]
    assert ids == text
    assert ids["prompt_token_ids"] == found["tokens"]
    assert len(ids["token_ids"]) == 5
    streamed = server.complete("a", found["tokens"], **asked, stream=True).events
    assert [t for e in streamed for t in e["choices"][0].get("token_ids", [])] == ids["token_ids"]


def test_logprobs_of_both_kinds(client, server):
    asked: Any = {"model": "a", "max_tokens": 4, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    chat = client.chat.completions.create(messages=ASK, logprobs=True, top_logprobs=3, **asked)
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    assert all(one.token == one.top_logprobs[0].token for one in content)
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content)
    plain = client.completions.create(prompt="The", logprobs=2, **asked).choices[0]
    assert len(plain.logprobs.tokens) == len(plain.logprobs.text_offset) == 4
    assert plain.logprobs.token_logprobs[0] == max(plain.logprobs.top_logprobs[0].values())
    whole = b"".join(bytes(one.bytes) for one in content)
    assert whole.decode(errors="replace") == chat.choices[0].message.content
    streamed = client.chat.completions.create(messages=ASK, logprobs=True, stream=True, **asked)
    ended = [c.choices[0].logprobs for c in streamed]
    assert [one.content[0].token for one in ended if one] == [one.token for one in content]


def test_stop_bias_and_end(server):
    text = server.text("a", "The", max_tokens=24)
    stop = text[4:7]
    assert server.text("a", "The", max_tokens=24, stop=stop) == text[: text.index(stop)]
    found = server.complete("a", "The", logit_bias={"70": 100}, max_tokens=3, return_token_ids=True)
    assert found.json["choices"][0]["token_ids"] == [70, 70, 70]
    end = server.parts.registry.base_model.renderer.tokenizer.eos_token_id
    ended = server.complete("a", "The", logit_bias={str(end): 100}, ignore_eos=False).json
    nothing = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert ended["choices"][0] == nothing


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_is_forced_and_read_back(client, choice):
    asked: Any = {"model": "a", "messages": ASK, "tools": [tool()], "tool_choice": choice}
    asked["seed"] = 1
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    call = whole.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    chunks = list(client.chat.completions.create(**asked, stream=True))
    calls = [t for c in chunks for t in c.choices[0].delta.tool_calls or []]
    assert [c.function.arguments for c in calls] == [call.function.arguments]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(c.choices[0].delta.content for c in chunks)
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    told = [*ASK, whole.message.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(model="a", messages=told, tools=[tool()], max_tokens=4)
    assert after.usage.prompt_tokens > 0


def test_responses_are_the_same_turn(client, server):
    asked: Any = {"model": "a", "temperature": 0, "max_output_tokens": 10}
    found = client.responses.create(input="What is the weather in Rome?", **asked)
    chat = client.chat.completions.create(model="a", messages=ASK, temperature=0, max_tokens=10)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.output_tokens == chat.usage.completion_tokens
    assert found.status in ("completed", "incomplete")
    events = list(client.responses.create(input=ASK, stream=True, **asked))
    assert events[0].type == "response.created"
    assert events[-1].type == f"response.{found.status}"
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == found.output_text == events[-1].response.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    flat = {"type": "function", **tool()["function"]}
    calling = {"model": "a", "input": ASK, "tools": [flat], "tool_choice": "required"}
    called = client.responses.create(**calling, instructions="Call.")
    call = called.output[0]
    assert (call.type, call.name) == ("function_call", "weather")
    by_type = {e.type: e for e in client.responses.create(**calling, stream=True)}
    begun, done = (by_type[f"response.output_item.{when}"].item for when in ("added", "done"))
    delta = by_type["response.function_call_arguments.delta"].delta
    assert (begun.arguments, begun.status) == ("", "in_progress")
    assert (done.arguments, done.status) == (delta, "completed")
    call_of = {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    more = [*ASK, {"type": "function_call", **call_of}, output]
    again = client.responses.create(input=more, tools=[flat], **asked)
    raw = server.ask("/v1/responses", {"model": "a", "input": "Hello"}).json
    Response.model_validate(raw, strict=False)
    assert again.usage.input_tokens > called.usage.input_tokens


def test_every_answer_validates_against_the_packages_types(server):
    """The client itself builds its types without validation, so they are validated here."""
    chat = {"model": "a", "messages": ASK, "max_tokens": 6, "seed": 0}
    called = chat | {"tools": [tool()], "tool_choice": "required", "max_tokens": 60}
    told = chat | {"logprobs": True, "top_logprobs": 2, "n": 2}
    plain = {"model": "a", "prompt": "The", "max_tokens": 6, "logprobs": 2}
    input = {"model": "a", "input": "Hello", "max_output_tokens": 6}
    flat = {"type": "function", **tool()["function"]}
    calling = {"model": "a", "input": ASK, "tools": [flat], "tool_choice": "required"}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    whole: list[tuple[str, dict[str, Any], Any]] = [
        ("/v1/chat/completions", chat, ChatCompletion),
        ("/v1/chat/completions", called, ChatCompletion),
        ("/v1/chat/completions", told, ChatCompletion),
        ("/v1/completions", plain, Completion),
        ("/v1/responses", input, Response),
        ("/v1/responses", calling, Response),
    ]
    parts = {ChatCompletion: ChatCompletionChunk, Completion: Completion}
    for path, body, kind in whole:
        answer = server.ask(path, body)
        assert answer.status == 200, answer.content
        kind.model_validate_json(answer.content)
        streamed = body | ({"stream": True} if kind is Response else options)
        part: Any = TypeAdapter(parts.get(kind, ResponseStreamEvent))
        events = server.ask(path, streamed).events
        assert events
        for event in events:
            if kind is Completion:  # of which a part has no type: its reason is null until its end
                for choice in event["choices"]:
                    choice["finish_reason"] = choice["finish_reason"] or "stop"
            part.validate_python(event)
    for model in server.ask("/v1/models").json["data"]:
        Model.model_validate(model)


@pytest.fixture(scope="module")
def expected(server: Running):
    """The log probability of each token by a pass of transformers, and of the likeliest one."""
    model = fresh_model(server.folder.parent / "base")
    lf.load(model, server.folder / "a")

    def of(ids: list[int]) -> tuple[list[float], list[float]]:
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return own.tolist(), logp.max(-1).values.tolist()

    return of


def check(choice: Any, ids: list[int], expected: Any) -> None:
    own, best = expected(ids)
    first, *others = choice.logprobs.token_logprobs
    assert first is None
    assert choice.logprobs.top_logprobs[0] is None
    assert others == pytest.approx(own, abs=1e-4)
    tops = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    assert tops == pytest.approx(best, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids)
    offsets = choice.logprobs.text_offset
    assert offsets == sorted(offsets)
    assert 0 == offsets[0] < offsets[-1] <= len(choice.text)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_prompts_have_log_probabilities(client, expected, max_tokens: int) -> None:
    more = {"ignore_eos": True, "return_token_ids": True}
    asked: dict[str, Any] = {"model": "a", "max_tokens": max_tokens, "temperature": 0, "n": 2}
    asked |= {"echo": True, "logprobs": 1, "extra_body": more}
    prompts = [PROMPT, "It rains."]
    found = client.completions.create(prompt=prompts, **asked)
    assert found.usage.completion_tokens == 4 * max_tokens
    for i, choice in enumerate(found.choices):
        check(choice, choice.prompt_token_ids + choice.token_ids, expected)
        assert choice.text.startswith(prompts[i // 2])
        if not max_tokens:
            assert choice.text == prompts[i // 2]
    ids = found.choices[0].prompt_token_ids
    again = client.completions.create(prompt=ids, **asked).choices[0]
    assert (again.text, again.logprobs) == (found.choices[0].text, found.choices[0].logprobs)
    parts = [c.choices[0] for c in client.completions.create(prompt=PROMPT, stream=True, **asked)]
    parts = [part for part in parts if part.index == 1]
    assert "".join(part.text for part in parts) == again.text
    likely = [p for part in parts if part.logprobs for p in part.logprobs.token_logprobs]
    assert likely == again.logprobs.token_logprobs
    offsets = [p for part in parts if part.logprobs for p in part.logprobs.text_offset]
    assert offsets == again.logprobs.text_offset


def test_an_echo_without_log_probabilities_is_the_text(server: Running) -> None:
    plain = server.text("a", PROMPT)
    assert server.text("a", PROMPT, echo=True) == PROMPT + plain
    streamed = server.complete("a", PROMPT, echo=True, stream=True).events
    assert "".join(one["choices"][0]["text"] for one in streamed) == PROMPT + plain
    assert all(one["choices"][0]["logprobs"] is None for one in streamed)


def test_one_prompt_is_read_once_for_all_its_completions(server, monkeypatch) -> None:
    runner = server.engine._runner
    forward, computed = runner.forward, []

    def spied(rows: Any, counts: Any) -> Any:
        computed.append(sum(counts))
        return forward(rows, counts)

    monkeypatch.setattr(runner, "forward", spied)
    many = {"max_tokens": 3, "n": 6, "temperature": 1, "seed": 1, "ignore_eos": True}
    turns = [{"role": "user", "content": "How is the weather in Rome on a day such as this?"}]
    for path, asked in {
        "/v1/completions": {"prompt": "How are you on a day such as this, and why?"},
        "/v1/chat/completions": {"messages": turns},
    }.items():
        computed.clear()
        answer = server.ask(path, {"model": "a"} | asked | many).json
        assert len(answer["choices"]) == 6
        # those that came after it was read compute its last token
        once = answer["usage"]["prompt_tokens"] + 6 * 2
        assert once - answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= sum(computed)
        assert sum(computed) <= once + 5
