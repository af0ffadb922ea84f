"""Rows of public data sets are read as they are meant, and turns may opt out of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import make_tokenizer
from conversation_cases import said, trained_texts, user
from error_cases import refusal, told_of
from large_cases import stream_of
from lorafold.api.arguments import as_prompts, as_rows
from lorafold.data.examples import encode
from lorafold.data.formats import CONVERSATIONS, JUDGED, PAIRS, PreferenceRow
from lorafold.data.prompts import references
from lorafold.data.render import Rendering
from lorafold.data.row_sources import Reading
from lorafold.data.rows import read_rows
from lorafold.errors import LorafoldError
from lorafold.objectives import check_formats

Told = list[str]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def turn(speaker: str, text: str, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text} | more


CALL = {"name": "f", "arguments": {"a": 1}}
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
TOOL = {"name": "f", "description": "d", "parameters": {"a": {"type": "int"}}}
WEIGHED = said("b") | {"weight": 0}


def read(row: dict[str, Any], objective: str | None = "sft", **columns: str) -> tuple[Any, Told]:
    """What a row gives the objective, and what is told."""
    rows = as_rows([row], Reading(columns), objective=objective)
    check_formats(rows.formats, objective or "sft")
    wanted = {"sft": CONVERSATIONS, "kto": JUDGED}.get(objective or "sft", PAIRS)
    return rows.extract(wanted)[0], lines_of(row, columns, objective)


def lines_of(row: Any, columns: dict[str, str] | None, objective: str | None) -> Told:
    told = told_of([row], columns, objective=objective).splitlines()
    return [line.partition(": ")[2] for line in told]


SETS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Told]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below ..."},
        [user("Add.\n1, 2"), said("3")],
        ["ignored keys: text (rows of {instruction, output})"],
    ),
    "dolly-15k": (
        {"instruction": "Who?", "context": "Ask Maren.", "response": "Maren", "category": "qa"},
        [user("Who?\nAsk Maren."), said("Maren")],
        ["ignored keys: category (rows of {instruction, response})"],
    ),
    "SlimOrca": (
        {"conversations": [
            turn("system", "Be brief.", weight=None), turn("human", "a", weight=0.0),
            turn("gpt", "b", weight=0.0), turn("human", "c", weight=None),
            turn("gpt", "d", weight=1.0),
        ]},
        [system("Be brief."), user("a"), WEIGHED, user("c"), said("d")],
        ["1 assistant turns are not trained on, because their rows exclude them"],
    ),
    "ultrachat_200k": (
        {"prompt": "a", "prompt_id": "x", "messages": [user("a"), said("b")]},
        [user("a"), said("b")],
        ["ignored keys: prompt, prompt_id (rows of {messages})"],
    ),
    "ultrafeedback_binarized": (
        {"prompt": "a", "prompt_id": "x", "chosen": [user("a"), said("b")],
         "rejected": [user("a"), said("c")], "messages": [user("a"), said("b")],
         "score_chosen": 8.5, "score_rejected": 1.0},
        [user("a"), said("b")],
        ["ignored keys: prompt, prompt_id, chosen, rejected, score_chosen, score_rejected (rows of"
         " {messages})"],
    ),
    "xlam-function-calling-60k": (
        {"id": 0, "query": "a", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL])},
        [user("a"), CALLED],
        ["ignored keys: id (rows of {query, answers, tools})"],
    ),
    "hermes-function-calling-v1": (
        {"id": "x", "conversations": [turn("system", "s"), turn("human", "a"), turn("gpt", "b"),
                                      turn("tool", "c")],
         "tools": json.dumps([{"type": "function", "function": TOOL}]), "category": "q"},
        [system("s"), user("a"), said("b"), {"role": "tool", "content": "c"}],
        ["ignored keys: id, category (rows of {conversations})"],
    ),
    "ToolACE": (
        {"system": "s", "conversations": [turn("user", "a"), turn("assistant", "[f(a=1)]")]},
        [system("s"), user("a"), said("[f(a=1)]")],
        [],
    ),
    "turns with roles": ({"conversations": [user("a"), said("b")]}, [user("a"), said("b")], []),
    "the older form of OpenAI": (
        {"messages": [
            user("a"), said("") | {"function_call": {"name": "f", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "f", "content": "2"}, said("b"),
         ], "functions": [TOOL]},
        [user("a"), CALLED, {"role": "tool", "name": "f", "content": "2"}, said("b")],
        ["1 messages are converted to the role tool: 'function'"],
    ),
    "columns of messages": (
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
        [user("a"), said("b")], [],
    ),
    "text of messages": (
        {"messages": json.dumps([user("a"), said("b")])}, [user("a"), said("b")], []
    ),
    "roles of others": (
        {"messages": [{"role": "Human", "content": "a"}, {"role": "bot", "content": "b"},
                      {"role": "narrator", "content": "c"}, {"role": "Assistant", "content": "d"}]},
        [user("a"), said("b"), {"role": "narrator", "content": "c"}, said("d")],
        ["1 messages are converted to the role user: 'Human'",
         "2 messages are converted to the role assistant: 'bot', 'Assistant'",
         "1 messages have an unknown role, passed to the chat template, and are not "
         "trained on: 'narrator'"],
    ),
    "system beside": (
        {"system": "s", "messages": [user("a"), said("b")]}, [system("s"), user("a"), said("b")], []
    ),
    "system twice": (
        {"system": "s", "messages": [system("s"), user("a"), said("b")]},
        [system("s"), user("a"), said("b")], [],
    ),
    "keys inside": (
        {"id": 1, "messages": [
            user("a") | {"id": 2, "name": "n", "x": None},
            said("b") | {"content": [{"type": "text", "text": "b", "cache_control": {}}]},
        ]},
        [user("a") | {"id": 2, "name": "n"}, said("b")],
        ["ignored keys: id, messages[].id, messages[].content[].cache_control; keys of messages"
         " are passed to the chat template (rows of {messages})"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_sets_of_conversations(name: str) -> None:
    row, messages, told = SETS[name]
    given, lines = read(row)
    assert given.messages == messages
    assert lines == told
    names = {tool["function"]["name"] for tool in given.tools}
    assert names == ({"f"} if "tools" in row or "functions" in row else set())


ULTRA = SETS["ultrafeedback_binarized"][0]
AS_TURNS = ["1 rows have texts that are split into Human and Assistant turns"]
BOTH: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Told]] = {
    "ultrafeedback_binarized": (
        ULTRA, [user("a")],
        ["ignored keys: prompt_id, messages, score_chosen, score_rejected (rows of {prompt, chosen,"
         " rejected})"],
    ),
    "its pairs alone": (
        {"chosen": ULTRA["chosen"], "rejected": ULTRA["rejected"]}, [user("a")], []
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: r\n\nHuman: a\n\nAssistant: b",
         "rejected": "\n\nHuman: q\n\nAssistant: r\n\nHuman: a\n\nAssistant: c"},
        [user("q"), said("r"), user("a")], AS_TURNS,
    ),
    "full-hh-rlhf": (
        {"prompt": "\n\nHuman: q\n\nAssistant: r\n\nHuman: a\n\nAssistant:", "chosen": " b",
         "rejected": " c"},
        [user("q"), said("r"), user("a")], AS_TURNS,
    ),
    "orca_dpo_pairs": (
        {"system": "s", "prompt": "a", "chosen": "b", "rejected": "c"}, [system("s"), user("a")], []
    ),
    "text and lists": (
        {"prompt": "a", "chosen": [said("b")], "rejected": [said("c")]}, [user("a")], []
    ),
    "text and a list": ({"prompt": "a", "chosen": "b", "rejected": [said("c")]}, [user("a")], []),
    "a prompt that answers repeat": (
        {"prompt": [system("s"), user("a")], "chosen": [system("s"), user("a"), said("b")],
         "rejected": [system("s"), user("a"), said("c")]}, [system("s"), user("a")], [],
    ),
    "a text that answers repeat after more": (
        {"prompt": "a", "chosen": [system("s"), user("a"), said("b")],
         "rejected": [system("s"), user("a"), said("c")]}, [system("s"), user("a")], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("objective", ["dpo", "reward", "kto", None])
def test_sets_of_preferences(name: str, objective: str | None) -> None:
    row, prompt, told = BOTH[name]
    rows = as_rows([row], objective=objective)
    answers = {"chosen": [said("b")], "rejected": [said("c")]}
    assert rows.extract(PAIRS) == [[PreferenceRow(prompt, answers)]]
    assert [len(one.completions) for one in rows.extract(JUDGED)[0]] == [1, 1]
    assert lines_of(row, None, objective) == told
    given, lines = read(row)
    assert given.messages == [*prompt, said("b")]
    if "messages" not in row:
        assert "rejected is not used by --objective sft" in lines[-1]


def test_a_set_of_judged_completions() -> None:
    row = {"prompt": [user("a")], "completion": [said("b")], "label": True}
    [given], told = read(row, "kto")
    assert (given.completions, given.desirable, told) == ({"completion": [said("b")]}, True, [])


def test_a_stream_and_prompts_take_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ULTRA) + "\n")
    for wanted, shown in ((PAIRS, "{prompt, chosen, rejected}"), (CONVERSATIONS, "{messages}")):
        stream = stream_of(str(tmp_path / "a.jsonl"), wanted=wanted)
        assert [str(found) for found in stream.formats] == [shown]
        assert str(read_rows(str(tmp_path / "a.jsonl"), content=wanted).formats[0]) == shown
    assert as_prompts([SETS["text of messages"][0]]) == [{"messages": [user("a"), said("b")]}]


def test_a_struct_of_lists_in_parquet(tmp_path: Path) -> None:
    kind = pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))])
    rows = [{"role": ["user", "assistant"], "content": ["a", "b"]}]
    pq.write_table(pa.table({"messages": pa.array(rows, kind)}), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == [{"messages": [user("a"), said("b")]}]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": [user("a"), said("b") | {"weight": 0.5}]},
         "field messages[1].weight: found 0.5, expected 0, 1, false or true"),
        ({"messages": [user("a"), said("b") | {"train": "no"}]},
         "field messages[1].train: found text, expected 0, 1, false or true"),
        ({"conversations": [turn("human", "a"), turn("gpt", "b", loss=2)]},
         "field conversations[1].loss: found 2, expected 0, 1, false or true"),
        ({"messages": [user("a"), said("") | {"function_call": 3}]},
         "field messages[1].function_call: found 3, expected an object with name and arguments"),
        ({"messages": [user("a") | {"function_call": CALL}]},
         "field messages[0].function_call: found with role user, expected role assistant"),
        ({"messages": {"role": ["user"], "content": []}},
         "field messages: found columns of values (1 in role, 0 in content), expected"),
        ({"messages": "[{'role': 'user'}]"},
         "field messages: found text that is not a JSON list (not JSON: found single quotes"),
        ({"chosen": "a", "rejected": "b"}, "field chosen: found text, expected a list of messages"),
        ({"query": "a", "answers": "f(1)", "tools": []}, "field answers: found invalid JSON (not"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(row: dict[str, Any], part: str) -> None:
    assert f"row 1: {part}" in refusal(as_rows, [row])


def trained(messages: list[dict[str, Any]], **rendering: Any) -> list[str]:
    """What is trained on of one conversation."""
    tokenizer, shown = make_tokenizer(), Rendering(**rendering)
    found = encode([{"messages": messages}], tokenizer, 500, rendering=shown).examples
    return trained_texts(found, tokenizer)


@pytest.mark.parametrize(
    "off", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False, "weight": 1}]
)
def test_a_turn_that_says_so_is_not_trained_on(off: dict[str, Any]) -> None:
    first, last = [user("a"), said("b")], [user("c"), said("d")]
    both = trained([*first, *last])
    assert [text[0] for text in both] == ["b", "d"]
    assert trained([first[0], first[1] | off, *last]) == both[1:]
    assert trained([*first, last[0], last[1] | off]) == both[:1]
    on = {key: 1 for key in off}
    assert trained([*first, last[0], last[1] | on]) == both
    assert trained([first[0], first[1] | off, *last], train_on="last") == both[1:]
    with pytest.raises(LorafoldError, match="none of the 1 rows has a token to train on"):
        trained([first[0], first[1] | off])


def test_such_a_turn_is_no_reference() -> None:
    rows = as_rows([{"messages": [user("a"), said("b"), user("c"), said("d") | {"weight": 0}]}])
    [reference] = references(rows.extract(CONVERSATIONS), make_tokenizer())
    assert reference.text == "b"


def test_turns_of_others_that_shall_be_trained_are_told() -> None:
    told = "1 turns that rows mark for training are not assistant turns, and are not trained on"
    assert read({"messages": [user("a") | {"train": True}, said("b")]})[1] == [told]
