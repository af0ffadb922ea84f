"""ShareGPT's turns: {"from": "human", "value": text}, and calls of functions as JSON in a turn.

    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'}
    {"from": "observation", "value": '{"degrees": 21}'}
"""

from collections.abc import Iterator
from typing import Any

from lorafold.data.messages import (
    ASKING,
    ROLES,
    Message,
    asking_problems,
    call_of,
    call_problems,
    list_problems,
    normalized,
    role_of,
    text_problems,
)
from lorafold.data.parsing import Row, kind_of, parsed

CALLERS = ("function_call", "tool_call")  # whose turns are calls, as JSON
SPEAKERS = (*ROLES, *CALLERS)
TURN_KEYS = {"from", "value", *ASKING}


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
    yield from asking_problems(name, turn)
    if speaker not in CALLERS and role_of(speaker) not in ROLES:
        yield f"field {name}.from: found {speaker!r}, expected one of {', '.join(SPEAKERS)}"
    if not isinstance(value, str) or speaker not in CALLERS:
        yield from text_problems(f"{name}.value", value)
        return
    try:
        calls = parsed(value)
    except ValueError as error:
        yield f"field {name}.value: found no JSON ({error}), expected that of a call"
        return
    yield from call_problems(f"{name}.value", calls if isinstance(calls, list) else [calls])


def turns_to_messages(turns: list[dict[str, Any]]) -> list[Message]:
    """The messages of checked turns."""
    return normalized([_message(turn) for turn in turns])


def _message(turn: dict[str, Any]) -> Message:
    speaker, value = turn["from"], turn["value"]
    asking = {key: turn[key] for key in ASKING if key in turn}
    if speaker not in CALLERS:
        return {"role": role_of(speaker), "content": value} | asking
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "tool_calls": [call_of(call) for call in calls]} | asking
