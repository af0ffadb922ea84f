"""Tools, calls, reasoning and preferences in rows: one form, shown or refused, read back."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import lorafold as lf
import lorafold.evaluation.loss_and_exact_match as lf_evaluation
from conversation_cases import (
    RESULT,
    ROME,
    ROWS,
    SYSTEM,
    WEATHER,
    called,
    prompts,
    said,
    starting_points,
    trained_texts,
    user,
)
from error_cases import refusal, told_of
from families import as_taken, embedded, names, tokenizer_of
from lorafold.cli import app
from lorafold.data.chat_template import MessageForm, template_of, tool_call
from lorafold.data.examples import NO_LOSS, encode, encode_row
from lorafold.data.formats import PAIRS, Conversation, PreferenceRow, format_of
from lorafold.data.messages import normalize, openai_tools
from lorafold.data.prompts import without_reasoning
from lorafold.data.render import render
from lorafold.data.rows import read_rows
from lorafold.data.tool_calls import parse_calls
from lorafold.engine import Ended
from lorafold.errors import LorafoldError
from lorafold.evaluation import EvaluationSettings, evaluate
from lorafold.models.built_in_templates import set_variables
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import set_template
from lorafold.models.tokenizer import tokenizer_of as tokenizer_for
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("unestimated")

TOOLS = [WEATHER, {"type": "function", "function": {
    "name": "set_alarm", "description": "Set an alarm.",
    "parameters": {
        "type": "object", "properties": {"code": {"type": "string"}, "loud": {"type": "boolean"}},
    },
}}]  # fmt: skip


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def conversation(row: dict[str, Any]) -> Conversation:
    row_format = format_of(row)
    assert row_format is not None
    assert list(row_format.problems(row)) == []
    return row_format.conversation(row)


@pytest.fixture
def with_tools() -> Any:
    """The embedded model's tokenizer with the built-in template."""
    made = copy.deepcopy(embedded())
    set_template(made, "tools")
    return made


def with_template(text: str) -> Any:
    made = copy.deepcopy(embedded())
    made.chat_template = text
    return made


# one form


def test_calls_have_one_form_however_they_are_written() -> None:
    wanted = [tool_call("get_weather", {"city": "Rome", "days": 2})]
    arguments = {"city": "Rome", "days": 2}
    for written in [
        {"type": "function", "function": {"name": "get_weather", "arguments": arguments}},
        {"function": {"name": "get_weather", "arguments": json.dumps(arguments)}},
        {"name": "get_weather", "arguments": json.dumps(arguments)},
        {"name": "get_weather", "arguments": arguments | {"code": None}, "id": None},  # as Arrow
    ]:
        row = chat(user("Rome?"), {"role": "assistant", "content": None, "tool_calls": [written]})
        assert conversation(row).messages[1] == {"role": "assistant", "tool_calls": wanted}
    kept = {"id": "a", **tool_call("f", {"x": None})}
    kept["function"]["arguments"] = '{"x": null}'  # JSON text keeps its nulls
    [message] = normalize([{"role": "assistant", "tool_calls": [kept], "content": ""}])
    assert message["tool_calls"] == [{"id": "a", **tool_call("f", {"x": None})}]


def test_tools_have_one_form_however_they_are_written() -> None:
    flat = WEATHER["function"]
    for written in ([WEATHER], [flat], json.dumps([WEATHER]), json.dumps([flat])):
        assert openai_tools(written) == (WEATHER,)
    nulls = [{**WEATHER, "strict": None}]
    assert openai_tools(nulls) == (WEATHER,)
    assert openai_tools(None) == openai_tools("") == openai_tools("[]") == ()


def test_contents_and_reasoning_have_one_form() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    row = chat(user(parts), {"role": "assistant", "content": "c", "thinking": "t", "name": None})
    assert conversation(row).messages == [
        user("a b"), {"role": "assistant", "content": "c", "reasoning_content": "t"},
    ]  # fmt: skip
    parts = [{"type": "thinking", "thinking": "t", "text": None}, {"type": "text", "text": "c"}]
    found = conversation(chat(user("a"), {"role": "assistant", "content": parts}))
    assert found.messages[1] == said("c", "t")
    assert "ignored keys" not in told_of([chat(user("a"), {"role": "assistant", "content": parts})])
    for key in ("reasoning", "reasoning_content"):
        found = conversation(chat(user("a"), {"role": "assistant", "content": "c", key: "t"}))
        assert found.messages[1]["reasoning_content"] == "t"
    plain = [user("a"), said("b")]
    assert conversation(chat(*plain)).messages[0] is plain[0]  # not copied


def test_sharegpt_has_calls_and_tools() -> None:
    turns = [
        {"from": "human", "value": "Rome?"},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": 1}})},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "It is 21."},
    ]
    row = {"conversations": turns, "tools": json.dumps([WEATHER]), "system": "Brief."}
    found = conversation(row)
    assert found.tools == (WEATHER,)
    roles = [m["role"] for m in found.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2] == {"role": "assistant", "tool_calls": [tool_call("f", {"a": 1})]}
    turns[1]["value"] = "f(1)"
    assert format_of(row) is not None
    [problem] = list(format_of(row).problems(row))  # type: ignore[union-attr]
    assert problem.startswith("field conversations[1].value: found invalid JSON (")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (chat(user(None)), "field messages[0].content: found null, expected text"),
        (chat(user([{"type": "image_url"}])),
         "field messages[0].content[0]: found a part of type image_url, expected only text"),
        (chat(user([{"type": "thinking", "thinking": "t"}])),
         "field messages[0].content[0]: found a part of type thinking, expected only text parts"),
        (chat(user("a"), {"role": "assistant", "content": [{"type": "thinking", "text": "t"}]}),
         "field messages[1].content[0].thinking: found null, expected text"),
        (chat(user([7])), "field messages[0].content[0]: found 7, expected a part of type text"),
        (chat(user([{"type": "text"}])),
         "field messages[0].content[0].text: found null, expected text"),
        (chat(user("a"), {"role": "assistant", "tool_calls": "f"}),
         "field messages[1].tool_calls: found text, expected a list of calls"),
        (chat(user("a"), {"role": "assistant", "tool_calls": [{"name": 3}]}),
         "field messages[1].tool_calls[0].name: found 3, expected text"),
        (chat(user("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}),
         "field messages[1].tool_calls[0].arguments: found text that is not JSON, expected"),
        (chat(user("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}),
         "field messages[1].tool_calls[0].arguments: found a list, expected an object or its JSON"),
        (chat(user("a") | {"tool_calls": [tool_call("f", {})]}),
         "field messages[0].tool_calls: found with role user, expected role assistant"),
        (chat(user("a"), said("b") | {"reasoning": 1}),
         "field messages[1].reasoning: found 1, expected text"),
        (chat(user("a"), tools="x"), "field tools: found text that is not JSON, expected JSON of"),
        (chat(user("a"), tools={"a": 1}), "field tools: found an object, expected a list of tools"),
        (chat(user("a"), tools=[{}]), "field tools[0].name: found null, expected text"),
        (chat(user("a"), tools=["f"]), "field tools[0]: found text, expected an object with a"),
        ({"chosen": "a", "rejected": "b"}, "field chosen: found text, expected a list of messages"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "found different first messages"),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "one begins with the other; expected"),
        ({"prompt": "a", "chosen": "b", "rejected": [user("c"), said("d")]},
         "fields prompt, chosen and rejected: the conversations do not begin with the"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, user("c"), said("d")]},
         "field system: found another system message in the conversation, expected only one"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_the_field(row: dict[str, Any], part: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    message = refusal(read_rows, str(path))
    assert message.startswith(f"{path}: row 1: ")
    assert part in message


# what a template does not show


def test_a_template_that_shows_no_tools_is_refused_and_told_what_helps() -> None:
    row = ROWS["tools"]
    for name in ("cohere", "deepseekv3", "gemma3", "phi3", "llama3"):
        message = refusal(encode_row, row, tokenizer_of(name))
        assert "the chat template does not render the tools" in message
        assert "--chat-template tools" in message
    without = chat(user("Rome?"), called(), RESULT, said(ROME))
    for name in ("deepseek_r1_distill", "lfm2", "llama3"):
        message = refusal(encode_row, without, tokenizer_of(name))
        assert "the chat template does not render tool calls" in message
    sandboxed = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{% set _ ="
    sandboxed += " messages.append(c) %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
    message = refusal(encode_row, without, with_template(sandboxed))
    assert "does not render tool calls (tool_calls): the model's chat template rejects" in message
    assert "access to attribute 'append' of 'list' object is unsafe" in message
    message = refusal(encode, [chat(user("a"), said("b")), row], embedded(), 512)
    assert message.startswith("data: row 2: the chat template does not render the tools")


@pytest.mark.parametrize(
    ("template", "row", "part"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
         chat(SYSTEM, user("a"), said("b")), "messages[0].content (system)"),
        ("{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{{"
         " m.tool_calls | tojson if m.tool_calls }}{% endfor %}",
         chat(user("a"), called(), RESULT, said("b")), "messages[2].content (tool)"),
        ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{"
         " c.function.name }}{% endfor %}{% endfor %}",
         chat(user("a"), called(), RESULT, said("b")), "messages[1].tool_calls[0].arguments"),
        ("{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls and"
         " not m.content }}{% endfor %}",
         chat(user("a"), called() | {"content": "One moment."}, RESULT, said("b")),
         "messages[1].tool_calls[0].name"),
    ],
)  # fmt: skip
def test_no_part_of_a_conversation_is_lost_in_silence(template, row, part) -> None:
    told = refusal(encode_row, row, with_template(template))
    assert f"the chat template does not render {part}" in told


def test_a_template_may_trim_quote_and_escape() -> None:
    tokenizer = with_template(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim | tojson }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = chat({"role": "system", "content": 'a "b"\n\tc <d> é '}, user(" x\ny "), said("z"))
    assert encode_row(row, tokenizer)[1].left_out == 0


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages[1].tool_calls[0].function.name }}"
         "{{ messages[1].tool_calls[0].function.arguments | tojson }}", MessageForm()),
        ("{{ messages[1].tool_calls[0].function.name + ' ' +"
         " messages[1].tool_calls[0].function.arguments }}", MessageForm(text=True)),
        ("{{ messages[1].tool_calls[0].function.name }}"
         "{{ messages[1].tool_calls[0].function.arguments }}", MessageForm(text=True)),
        ("{{ '' + messages[1].content }}{{ messages[1].tool_calls[0].function.name }}"
         "{{ messages[1].tool_calls[0].function.arguments | tojson }}", MessageForm(empty=True)),
        ("{% for m in messages %}{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endfor %}",
         MessageForm(parts=True)),
    ],
)  # fmt: skip
def test_the_form_of_a_template_is_found_by_rendering(template: str, form: MessageForm) -> None:
    assert template_of(with_template(template)).form == form


# the built-in template


def test_the_built_in_template_shows_everything(with_tools: Any) -> None:
    row = ROWS["both"]
    [example], trained = encode_row(row, with_tools)
    assert (trained.left_out, trained.hidden) == (0, 0)
    messages = as_taken("tools", row["messages"])
    assert list(example.ids) == with_tools.apply_chat_template(
        messages, tools=row["tools"], return_dict=False
    )
    text = with_tools.decode(example.ids)
    for part in ("A tool.", '"arguments": {"city": "Rome", "days": 2}', '{"degrees": 21}', "Oslo?",
                 '"description": "The weather of a city."'):  # fmt: skip
        assert text.count(part) == 1, part
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = with_tools.apply_chat_template(
                messages[:i], tools=row["tools"], add_generation_prompt=True, return_dict=False
            )
            assert list(example.ids[: len(prompt)]) == prompt
            assert example.labels[len(prompt) - 1] == NO_LOSS
            assert example.labels[len(prompt)] != NO_LOSS


def test_the_built_in_template_suits_a_tokenizer_without_chatml() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("llama3"))
    tokenizer.chat_template = None
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["added_tokens"] = [
        token for token in vocabulary["added_tokens"] if not token["content"].startswith("<|im_")
    ]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)), eos_token="<eos>"
    )
    set_template(plain, "tools")
    text = render([user("Rome?"), said("Yes.")], plain, tools=[WEATHER])
    assert "### Assistant:\nYes.<eos>\n" in text
    plain.eos_token = None
    assert "neither <|im_start|> and <|im_end|> nor" in refusal(set_template, plain, "tools")


# reading calls back

CALLS = {
    "one": [tool_call("get_weather", {"city": 'New York, "NY"', "days": 2})],
    "two": [
        tool_call("get_weather", {"city": "Rome"}),
        tool_call("set_alarm", {"code": "007", "loud": True}),
    ],
    "no arguments": [tool_call("set_alarm", {})],
    "nested": [tool_call("get_weather", {"city": "Rome", "x": ["a", "b"], "y": {"z": 1}})],
}  # fmt: skip


# no one text precedes each value, name or call: types of values, names alone, and numbered calls
UNREAD = ("Kimi-K3", "MiniMax-M3", "deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4",
          "meetkai-functionary-medium-v3.2", "moonshotai-Kimi-K2")  # fmt: skip


@pytest.mark.few(24)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", [name for name in names() if not name.startswith(UNREAD)])
def test_calls_are_read_back(name: str, kind: str) -> None:
    tokenizer = tokenizer_of(name)
    row = chat(user("Rome?"), {"role": "assistant", "tool_calls": CALLS[kind]}, tools=TOOLS)
    try:
        [example], _ = encode_row(row, tokenizer)
    except LorafoldError as error:
        assert re.search("does not render|single|rejects|supports", str(error))  # noqa: PT017
        return
    said = [label for label in example.labels if label != NO_LOSS]
    for bare in (False, True):  # as a model says it, and as lf.generate shows it
        text = tokenizer.decode(said, skip_special_tokens=bare)
        assert parse_calls(text, tokenizer, openai_tools(TOOLS)) == CALLS[kind]
    assert parse_calls("It is 21 degrees.", tokenizer) == []


@pytest.mark.parametrize(
    "name",
    ["gemma4", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "nemotron_3_nano", "qwen2_5", "qwen3",
     "qwen3_5_think"],
)  # fmt: skip
def test_calls_are_read_as_transformers_reads_them(name: str) -> None:
    """With trl's own description of the family's answers, where it has one."""
    from trl.chat_template_utils import add_response_schema

    tokenizer = copy.deepcopy(tokenizer_of(name))
    add_response_schema(tokenizer)
    row = chat(user("Rome?"), {"role": "assistant", "tool_calls": CALLS["one"]}, tools=TOOLS)
    [example], _ = encode_row(row, tokenizer)
    first = next(t for t, label in enumerate(example.labels) if label != NO_LOSS)
    prefix, text = (tokenizer.decode(ids) for ids in (example.ids[:first], example.ids[first:]))
    theirs = tokenizer.parse_response(text, prefix=prefix, tools=TOOLS)["tool_calls"]
    ours = parse_calls(text, tokenizer, openai_tools(TOOLS))
    assert [c["function"] for c in ours] == [c["function"] for c in theirs]


def test_calls_that_cannot_be_read(with_tools: Any) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>'
    assert "the call of f has arguments that are not JSON" in refusal(parse_calls, text, with_tools)
    digits = text.replace('{"a": }', f'{{"a": {"9" * 5000}}}')
    assert "arguments that are not JSON: Exceeds the limit" in refusal(
        parse_calls, digits, with_tools
    )
    half = text.replace('{"a": }', '{"a": "\\ud83d"}')
    assert "half of a surrogate pair" in refusal(parse_calls, half, with_tools)
    good = text.replace('{"a": }', '{"a": "<tool_call>"}')
    assert parse_calls(good, with_tools) == [tool_call("f", {"a": "<tool_call>"})]
    for other in ('{"name": "f"}', '{"arguments": {}, "name": "f"}', "[]", '{"name": 3}'):
        form = f"<tool_call>\n{other}\n</tool_call>"
        for found in (form, good + form, form + good):
            told = refusal(parse_calls, found, with_tools)
            assert "found <tool_call> without a call, expected '<tool_call>" in told
    assert "does not render tool calls" in refusal(parse_calls, "x", embedded())
    loose = 'Sure. <tool_call>{"name":"f","arguments":{"a":1}}</tool_call>'
    assert parse_calls(loose, with_tools) == [tool_call("f", {"a": 1})]


# evaluation and generation


def test_a_reference_is_the_call_as_the_template_writes_it(with_tools: Any) -> None:
    row = chat(SYSTEM, user("Rome?"), called("A tool."), tools=[WEATHER])
    [(prompt, reference)] = prompts([row], with_tools)
    said = '{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}'
    assert reference == f"<tool_call>\n{said}\n</tool_call>"
    assert prompt == with_tools.apply_chat_template(
        row["messages"][:2], tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert "does not render the tools" in refusal(prompts, [row], embedded())


def test_an_answer_counts_without_its_reasoning() -> None:
    """A model that thinks says more than the reference."""
    tokenizer = tokenizer_of("qwen3")
    [(prompt, reference)] = prompts([ROWS["thinking"]], tokenizer)
    assert reference == "I do not know."
    for answer in ("<think>\nA hard one.\n</think>\n\nI do not know.", "I do not know."):
        assert without_reasoning(answer, prompt, tokenizer) == reference


def test_evaluation_and_generation_with_tools(tiny_model_dir, tmp_path: Path, monkeypatch) -> None:
    """What the model says is given: the tiny one can't learn it (benchmarks/function_calls.py)."""
    base, file, seen = tiny_model_dir("llama"), tmp_path / "tools.json", []
    model, tokenizer = lf.load_model(base, storage="fp32"), lf.load_tokenizer(base)
    set_template(tokenizer, "tools")
    rows = [
        chat(user(f"Alarm {n}"), {"role": "assistant", "tool_calls": [
            {"name": "set_alarm", "arguments": {"code": str(n)}}]}, tools=TOOLS) for n in (1, 2)
    ]  # fmt: skip
    text = '<tool_call>\n{"name": "set_alarm", "arguments": {"code": "1"}}\n</tool_call>'

    def one(*args: Any, **how: Any) -> list[str]:
        seen.extend(args[2])
        return [text] * len(args[2])

    monkeypatch.setattr("lorafold.evaluation.loss_and_exact_match.complete", one)
    monkeypatch.setattr("lorafold.generation.complete", one)
    found = evaluate(model, tokenizer, rows, 512)
    assert found.exact_match == 0.5
    assert [answer.exact for answer in found.rows] == [True, False]
    assert found.rows[0].prompt == "Alarm 1"
    assert all("set_alarm" in prompt and "get_weather" in prompt for prompt in seen)
    seen.clear()
    for tools in (TOOLS, json.dumps(TOOLS), [tool["function"] for tool in TOOLS]):
        said = lf.generate(model, "Alarm 1", tokenizer=tokenizer, tools=tools)
        assert parse_calls(said, tokenizer) == [tool_call("set_alarm", {"code": "1"})]
    assert seen == seen[:1] * 3 == [prompts(rows[:1], tokenizer)[0][0]] * 3
    asked = {"tokenizer": lf.load_tokenizer(base), "tools": TOOLS}
    assert "does not render the tools" in refusal(lf.generate, model, "Alarm", **asked)
    asked = {"tokenizer": tokenizer, "tools": "x"}
    assert "field tools: found" in refusal(lf.generate, model, "Alarm", **asked)

    # the command
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")

    def streamed(*args: Any) -> Generator[str, None, Ended]:
        yield from (text[:20], text[20:])
        return Ended("made", "stop", (1, 2), text)

    monkeypatch.setattr("lorafold.generation.stream", streamed)
    asked = ("generate", "--model", str(tmp_path / "model"), "--tools", str(file), "--prompt", "A")
    file.write_text(json.dumps(TOOLS))
    done = CliRunner().invoke(app, [*asked, "--json"])
    wanted = [tool_call("set_alarm", {"code": "1"})]
    assert json.loads(done.stdout.splitlines()[-1])["tool_calls"] == wanted
    done = CliRunner().invoke(app, asked)
    assert done.stdout == text + "\n"
    assert "function call: set_alarm {'code': '1'}" in done.stderr
    for content, part in [("{", "not JSON"), ("{}", "expected a list of tools")]:
        file.write_text(content)
        done = CliRunner().invoke(app, asked)
        assert done.exit_code != 0
        assert part in str(done.exception) + done.stderr
    file.unlink()
    done = CliRunner().invoke(app, asked)
    assert "can't be read: No such file" in str(done.exception) + done.stderr


def test_the_loss_has_rows_as_its_units_whatever_examples_they_give(tiny_model_dir, monkeypatch):
    model = lf.load_model(tiny_model_dir("llama"), storage="fp32")
    tokenizer = copy.deepcopy(lf.load_tokenizer(tiny_model_dir("llama")))
    tokenizer.chat_template = tokenizer_of("qwen3").chat_template
    seen: list[Any] = []
    real = lf_evaluation.loss_interval

    def noted(sums: Any) -> Any:
        seen.append(sums)
        return real(sums)

    monkeypatch.setattr(lf_evaluation, "loss_interval", noted)
    rows = [ROWS["thinking"], ROWS["plain"]]
    found = evaluate(model, tokenizer, rows, 2048, EvaluationSettings(completions=False))
    examples = encode(rows, tokenizer, 2048).examples
    assert len(examples) > 2
    [sums] = seen
    assert len(sums) == found.n == 2
    labelled = [sum(label != NO_LOSS for label in e.labels[1:]) for e in examples]
    assert sum(n for _, n in sums) == sum(labelled)


# variables of a template


def test_variables_are_values_of_the_template_itself(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer_of("qwen3"))

    def asked(of: Any, **variables: Any) -> str:
        how = {"tokenize": False, "add_generation_prompt": True} | variables
        return str(of.apply_chat_template([user("Hi")], **how))

    set_variables(tokenizer, {"enable_thinking": False})
    assert asked(tokenizer) == asked(tokenizer_of("qwen3"), enable_thinking=False)
    assert asked(tokenizer).endswith("<think>\n\n</think>\n\n")
    assert not asked(tokenizer, enable_thinking=True).endswith("</think>\n\n")
    # what the template supplies is not trained on, and the last value given holds
    examples, trained = encode_row(ROWS["thinking"], tokenizer)
    assert (len(examples), trained.hidden) == (2, 2)
    said = [f"{answer}<|im_end|>" for answer in ("It is 21 degrees.", "I do not know.")]
    assert trained_texts(examples, tokenizer) == said
    set_variables(tokenizer, {"enable_thinking": True})
    assert asked(tokenizer).endswith("assistant\n")
    tokenizer.save_pretrained(tmp_path)
    assert "enable_thinking" in (tmp_path / "chat_template.jinja").read_text()


def test_variables_have_values_of_every_kind() -> None:
    for value in (True, None, 3, -1.5, 'naïve 🙂 "x" %} \\n', [1, None], {"a": [False]}):
        made = with_template("{{ value | tojson }}")
        set_variables(made, {"value": value})
        assert json.loads(made.apply_chat_template([user("a")], tokenize=False)) == value


def test_variables_that_are_never_read_are_refused() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("llama3_1"))
    message = refusal(set_variables, tokenizer, {"enable_thinking": False, "date_string": "today"})
    assert "found enable_thinking, which the chat template does not use" in message
    assert "date_string" in message.partition("expected")[2]
    assert "messages" not in message
    message = refusal(set_variables, copy.deepcopy(embedded()), {"x": 1})
    assert "expected none, because the template has no variables" in message


def test_variables_are_fields_of_the_recipe_and_saved_with_the_adapter(tiny_model_dir, tmp_path):
    recipe = load_recipe(None, ["template_kwargs.name=Ada", "template_kwargs.loud=false"])
    assert recipe.template_kwargs == {"name": "Ada", "loud": False}
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ name or 'Bob' }} {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ name or 'Bob' }} {% endif %}"
    )
    base, data = tiny_model_dir("llama"), [{"prompt": "Book", "completion": "Yes"}] * 2
    made = Recipe(chat_template=str(template), template_kwargs={"name": "Ada"}, steps=1, batch=2)
    lf.train(made, data=data, model=base, out=tmp_path / "out")
    tokenizer = tokenizer_for(resolve_model(str(base)), [tmp_path / "out"])
    [(prompt, _)] = prompts(data[:1], tokenizer)
    assert prompt == f"Ada Book{tokenizer.eos_token}Ada "


# preferences


def test_preferences_have_one_form_and_sft_trains_on_the_chosen() -> None:
    prompt, good, bad = [user("Rome?")], [said("Warm.")], [said("Cold.")]
    rows: list[dict[str, Any]] = [
        {"prompt": "Rome?", "chosen": "Warm.", "rejected": "Cold."},
        {"prompt": prompt, "chosen": good, "rejected": bad},
        {"chosen": prompt + good, "rejected": prompt + bad},
        {"conversations": [{"from": "human", "value": "Rome?"}],
         "chosen": {"from": "gpt", "value": "Warm."},
         "rejected": {"from": "gpt", "value": "Cold."}},
    ]  # fmt: skip
    for row in rows:
        shape: Any = format_of(row)
        [pair] = shape.extract(PAIRS, row)
        assert pair == PreferenceRow(prompt, {"chosen": good, "rejected": bad})
        assert conversation(row) == Conversation(prompt + good, 1)
        assert "rejected is not used by --objective sft" in told_of([row])
        examples = encode([row], embedded(), 128).examples
        assert trained_texts(examples, embedded()) == ["Warm.<|im_end|>"]


def test_starting_points_are_those_of_a_row_with_tools() -> None:
    """Or the law would be tested without them."""
    text = tokenizer_of("qwen3").decode(starting_points("qwen3", ROWS["tools"])[2])
    assert "get_weather" in text
