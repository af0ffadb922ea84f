"""ShareGPT's turns: {"from": "human", "value": text}, and calls of functions as JSON in a turn.

    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'}
    {"from": "observation", "value": '{"degrees": 21}'}
"""

import json
from collections.abc import Iterator
from typing import Any

from lorafold.data.messages import Message, call_of, call_problems, list_problems, text_problems
from lorafold.data.sources import Row, kind_of

# Who speaks in a turn, and the role of that in messages.
SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
    **{"function_call": "assistant", "tool_call": "assistant"},
}
CALLERS = ("function_call", "tool_call")  # whose turns are calls, as JSON


def turns_problems(row: Row) -> Iterator[str]:
    """What is wrong with the turns of a row, under `conversations`."""
    turns = row["conversations"]
    if any(wrong := list(list_problems("conversations", turns, "turns"))):
        yield from wrong
        return
    for index, turn in enumerate(turns):
        yield from turn_problems(f"conversations[{index}]", turn)


def turn_problems(name: str, turn: Any) -> Iterator[str]:
    """What is wrong with one turn, whose field has that name."""
    if not isinstance(turn, dict):
        yield f"field {name}: found {kind_of(turn)}, expected an object with from and value"
        return
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in SPEAKERS:
        yield f"field {name}.from: found {speaker!r}, expected one of {', '.join(SPEAKERS)}"
    if not isinstance(value, str) or speaker not in CALLERS:
        yield from text_problems(f"{name}.value", value)
        return
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        yield f"field {name}.value: found no JSON ({error.msg}), expected that of a call"
        return
    yield from call_problems(f"{name}.value", calls if isinstance(calls, list) else [calls])


def turns_to_messages(turns: list[dict[str, Any]]) -> list[Message]:
    """The messages of checked turns."""
    return [_message(turn["from"], turn["value"]) for turn in turns]


def _message(speaker: str, value: str) -> Message:
    if speaker not in CALLERS:
        return {"role": SPEAKERS[speaker], "content": value}
    calls = json.loads(value)
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": SPEAKERS[speaker], "tool_calls": [call_of(call) for call in calls]}
