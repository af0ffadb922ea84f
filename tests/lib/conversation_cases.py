"""Conversations with tools, calls, results and reasoning, and where generation starts in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families import as_taken, tokenizer_of
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.formats import CONVERSATIONS
from lorafold.data.prompts import references
from lorafold.data.row_store import Rows

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city.",
    "parameters": {
        "type": "object", "required": ["city"],
        "properties": {
            "city": {"type": "string", "description": "Its name"}, "days": {"type": "integer"},
        },
    },
}}  # fmt: skip


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, thought: str | None = None) -> dict[str, Any]:
    more = {} if thought is None else {"reasoning_content": thought}
    return {"role": "assistant", "content": text} | more


def called(thought: str | None = None) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}
    call = {"id": "call1abcd", "type": "function", "function": function}
    more = {} if thought is None else {"reasoning_content": thought}
    return {"role": "assistant", "content": None, "tool_calls": [call]} | more


SYSTEM = {"role": "system", "content": "Be brief and kind."}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call1abcd",
          "content": '{"degrees": 21}'}  # fmt: skip
PARTS = user([{"type": "text", "text": "And in "}, {"type": "text", "text": "Oslo?"}])
HOW, ROME, OSLO = user("How is Rome?"), "It is 21 degrees.", "I do not know."
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [HOW, said(ROME), PARTS, said(OSLO)]},
    "system": {"messages": [SYSTEM, HOW, said(ROME), PARTS, said(OSLO)]},
    "tools": {
        "messages": [SYSTEM, HOW, called(), RESULT, said(ROME), PARTS, said(OSLO)],
        "tools": [WEATHER],
    },
    "thinking": {"messages": [HOW, said(ROME, "Easy."), PARTS, said(OSLO, "A hard one.")]},
    "both": {
        "messages": [HOW, called("A tool."), RESULT, said(ROME, "Easy."), PARTS,
                     said(OSLO, "A hard one.")],
        "tools": [WEATHER],
    },
}  # fmt: skip


def starting_points(name: str, row: dict[str, Any]) -> dict[int, list[int]]:
    """The ids that transformers gives generation to start from, by the turn to generate."""
    messages = as_taken(name, row["messages"])
    return {
        i: tokenizer_of(name).apply_chat_template(
            messages[:i], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    }


def trained_runs(example: Example) -> list[tuple[int, ...]]:
    """The runs of labelled tokens."""
    runs: list[tuple[int, ...]] = [()]
    for label in example.labels:
        if label != NO_LOSS:
            runs[-1] += (label,)
        elif runs[-1]:
            runs.append(())
    return [run for run in runs if run]


def trained_texts(examples: Sequence[Example], tokenizer: Any) -> list[str]:
    """The texts that examples train on."""
    return [str(tokenizer.decode(run)) for one in examples for run in trained_runs(one)]


def jsonl(path: Path, *rows: Any) -> str:
    """Write rows, or lines as they stand; the file's name."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def prompts(rows: list[dict[str, Any]], tokenizer: Any) -> list[tuple[str, str]]:
    """(prompt ready for generation, reference completion) of each row."""
    given = Rows.of(rows).extract(CONVERSATIONS)
    return [(found.prompt, found.text) for found in references(given, tokenizer)]
