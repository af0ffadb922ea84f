"""Validates messages and tools, and normalizes them to OpenAI's format:

    {"role": "assistant", "content": text, "reasoning_content": text, "weight": 0, "tool_calls": [
        {"type": "function", "function": {"name": text, "arguments": {...}}}]}

Arguments are an object. A null value counts as absent, because Arrow and Parquet fill rows with
nulls. `*_problems` yield a line per error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorafold.data.json_input import Row, json_type, parsed

Message = dict[str, Any]
Tool = dict[str, Any]
# the messages of a prompt, and of each completion by field name
Said = tuple[list[Message], dict[str, list[Message]]]
REASONING = ("reasoning_content", "reasoning", "thinking")
ASKING = ("weight", "train", "training", "loss")  # whether to train on a turn
FORM = frozenset(("role", "content", "tool_calls", "name", "tool_call_id"))
KEYS = FORM | {"function_call", *REASONING, *ASKING}
ROLES = {  # other names of roles
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "ai", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
    **{name: name for name in ("system", "user", "assistant", "tool", "developer")},
}
CALLERS = ("function_call", "tool_call")  # roles whose turns are calls in JSON
SPEAKERS = (*ROLES, *CALLERS)
TURN_KEYS = {"from", "value", *ASKING}


def unlike(field: str, value: Any, expected: str) -> str:
    return f"field {field}: found {json_type(value)}, expected {expected}"


def text_problems(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield unlike(name, value, "text")


def list_problem(name: str, value: Any, of: str) -> str:
    """Checks that a field is a non-empty list; returns a problem or an empty text."""
    if value == []:
        return f"field {name}: found an empty list, expected a list of {of}"
    return "" if isinstance(value, list) else unlike(name, value, f"a list of {of}")


def message_problems(name: str, value: Any) -> Iterator[str]:
    if wrong := list_problem(name, value, "messages"):
        yield wrong
        return
    for index, message in enumerate(value):
        field = f"{name}[{index}]"
        if not isinstance(message, dict):
            yield unlike(field, message, "an object with role and content")
            continue
        role, content = message.get("role"), message.get("content")
        if len(message) == 2 and isinstance(role, str) and isinstance(content, str):
            continue  # the common case
        yield from text_problems(f"{field}.role", role)
        calls, called = message.get("tool_calls"), bool(_calls(message))
        yield from _content(f"{field}.content", content, called)
        key = "tool_calls" if calls else "function_call"
        if calls:
            yield from call_problems(f"{field}.{key}", calls)
        elif called:
            yield from call_problem(f"{field}.{key}", message[key])
        if called and role_of(role) != "assistant":
            yield f"field {field}.{key}: found with role {role}, expected role assistant"
        for key in REASONING:
            if message.get(key) is not None:
                yield from text_problems(f"{field}.{key}", message[key])
        yield from asking_problems(field, message)


def asking_problems(field: str, message: Message) -> Iterator[str]:
    for key in ASKING:
        if message.get(key) not in (None, 0, 1):
            yield unlike(f"{field}.{key}", message[key], "0, 1, false or true")


def asks(message: Message) -> bool | None:
    """Whether to train on a checked message; None if unspecified."""
    said = [bool(message[key]) for key in ASKING if message.get(key) is not None]
    return all(said) if said else None


def role_of(name: Any) -> Any:
    return ROLES.get(name.strip().lower(), name) if isinstance(name, str) else name


def _calls(message: Message) -> list[Any]:
    single = message.get("function_call")
    return message.get("tool_calls") or [single] * (single is not None)


def _content(name: str, value: Any, optional: bool) -> Iterator[str]:
    """Checks text, a list of text parts or, if optional, null."""
    if not isinstance(value, list):
        if value is not None or not optional:
            yield from text_problems(name, value)
        return
    for index, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind is None:
            yield unlike(f"{name}[{index}]", part, "a part of type text")
        elif kind != "text":
            yield f"field {name}[{index}]: found a part of type {kind}, expected only text parts"
        else:
            yield from text_problems(f"{name}[{index}].text", part.get("text"))


def call_problems(name: str, calls: Any) -> Iterator[str]:
    if not isinstance(calls, list):
        yield unlike(name, calls, "a list of calls")
        return
    for index, call in enumerate(calls):
        yield from call_problem(f"{name}[{index}]", call)


def call_problem(field: str, call: Any) -> Iterator[str]:
    expected = "an object with name and arguments"
    if isinstance(call, dict) and call.get("function") is not None:
        field, call, expected = f"{field}.function", call["function"], "an object"
    if not isinstance(call, dict):
        yield unlike(field, call, expected)
        return
    yield from text_problems(f"{field}.name", call.get("name"))
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        if other := _other(arguments, dict):
            yield f"field {field}.arguments: found {other}, expected JSON of an object"
    elif arguments is not None and not isinstance(arguments, dict):
        yield unlike(f"{field}.arguments", arguments, "an object or its JSON text")


def tool_problems(value: Any) -> Iterator[str]:
    """Checks a list of JSON schemas, its JSON text, or empty text."""
    if isinstance(value, str):
        if not value.strip():
            return
        if other := _other(value, list):
            yield f"field tools: found {other}, expected JSON of a list of tools"
            return
        value = parsed(value)
    if not isinstance(value, list):
        yield unlike("tools", value, "a list of tools")
        return
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict):
            yield unlike(f"tools[{index}]", function, "an object with a name")
        else:
            yield from text_problems(f"tools[{index}].name", function.get("name"))


def said_by(role: str, value: Any) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else normalized(value)


def normalized(messages: list[Message]) -> list[Message]:
    return [
        message
        if isinstance(message.get("content"), str)
        and "tool_calls" not in message
        and FORM.issuperset(message)
        and ROLES.get(message["role"]) == message["role"]
        and None not in message.values()
        else _normalized(message)
        for message in messages
    ]


def tools_of(value: Any) -> tuple[Tool, ...]:
    if isinstance(value, str):
        value = parsed(value) if value.strip() else []
    else:
        value = without_nulls(value or [])
    return tuple(
        tool if "function" in tool else {"type": "function", "function": tool} for tool in value
    )


def call_of(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = function.get("arguments")
    arguments = parsed(arguments) if isinstance(arguments, str) else without_nulls(arguments)
    function = {"name": function["name"], "arguments": arguments or {}}
    more = {k: v for k, v in call.items() if v is not None and k not in ("name", "arguments")}
    return more | {"type": "function", "function": function}


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _normalized(message: Message) -> Message:
    result = {key: value for key, value in message.items() if value is not None}
    calls, trained = _calls(result), asks(result)
    for key in ("tool_calls", "function_call", *ASKING):
        result.pop(key, None)
    result["role"] = role_of(result["role"])
    if trained is False and result["role"] == "assistant":
        result["weight"] = 0
    if isinstance(result.get("content"), list):
        result["content"] = "".join(part["text"] for part in result["content"])
    thoughts = [result.pop(key) for key in REASONING if key in result]
    if thoughts and thoughts[0]:
        result["reasoning_content"] = thoughts[0]
    if calls:
        result["tool_calls"] = list(map(call_of, calls))
        if not result.get("content"):
            result.pop("content", None)
    return result


def _other(text: str, kind: type) -> str:
    try:
        value = parsed(text)
    except ValueError as error:
        return "text, not JSON" if "not JSON" in str(error) else f"JSON that can't be used: {error}"
    return "" if isinstance(value, kind) else f"JSON of {json_type(value)}"


def turns_problems(row: Row) -> Iterator[str]:
    turns = row["conversations"]
    if wrong := list_problem("conversations", turns, "turns"):
        yield wrong
        return
    for index, turn in enumerate(turns):
        yield from turn_problems(f"conversations[{index}]", turn)


def turn_problems(name: str, turn: Any) -> Iterator[str]:
    if not isinstance(turn, dict):
        yield unlike(name, turn, "an object with from and value")
        return
    speaker, value = turn.get("from"), turn.get("value")
    yield from asking_problems(name, turn)
    if speaker not in CALLERS and role_of(speaker) not in ROLES:
        yield f"field {name}.from: found {speaker!r}, expected one of {', '.join(SPEAKERS)}"
    yield from text_problems(f"{name}.value", value)
    if isinstance(value, str) and speaker in CALLERS:
        try:
            calls = parsed(value)
        except ValueError as error:
            yield f"field {name}.value: found invalid JSON ({error}), expected a call"
            return
        yield from call_problems(f"{name}.value", calls if isinstance(calls, list) else [calls])


def turns_to_messages(turns: list[dict[str, Any]]) -> list[Message]:
    messages = []
    for turn in turns:
        message = {"role": role_of(turn["from"]), "content": turn["value"]}
        if turn["from"] in CALLERS:
            calls = parsed(turn["value"])
            calls = calls if isinstance(calls, list) else [calls]
            message = {"role": "assistant", "tool_calls": calls}
        messages.append(message | {key: turn[key] for key in ASKING if key in turn})
    return normalized(messages)


def instruction_problems(answered: str, beside: str, row: Row) -> Iterator[str]:
    for key in ("instruction", answered, *([beside] if row.get(beside) is not None else [])):
        yield from text_problems(key, row[key])


def instruction(answered: str, beside: str, row: Row) -> Said:
    request = "\n".join(filter(None, (row["instruction"], row.get(beside))))
    return said_by("user", request), {answered: said_by("assistant", row[answered])}


def query_problems(row: Row) -> Iterator[str]:
    yield from text_problems("query", row["query"])
    try:
        yield from call_problems("answers", _answers(row))
    except ValueError as error:
        yield f"field answers: found invalid JSON ({error}), expected a list of calls"


def query(row: Row) -> Said:
    calls = list(map(call_of, _answers(row)))
    return said_by("user", row["query"]), {"answers": [{"role": "assistant", "tool_calls": calls}]}


def system_problems(row: Row, wrong: bool) -> Iterator[str]:
    """Checks `system`, and compares it with the conversation unless the row is `wrong`."""
    yield from text_problems("system", row["system"])
    if not wrong and row["system"] and _own_system(row) not in (None, row["system"]):
        yield "field system: found another system message in the conversation, expected only one"


def system_of(row: Row) -> list[Message]:
    return [] if _own_system(row) is not None else [{"role": "system", "content": row["system"]}]


def _own_system(row: Row) -> str | None:
    for key in ("messages", "conversations", "prompt", "chosen"):
        first = row[key][0] if isinstance(row.get(key), list) and row[key] else None
        if isinstance(first, dict) and "system" in (first.get("role"), first.get("from")):
            return str(first.get("content", first.get("value")))
    return None


def _answers(row: Row) -> list[dict[str, object]]:
    """Raises ValueError if the calls aren't JSON."""
    answers = row["answers"]
    return parsed(answers) if isinstance(answers, str) else answers
