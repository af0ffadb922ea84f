"""Validates messages and tools, and normalizes them to OpenAI's format:

    {"role": "assistant", "content": text, "reasoning_content": text, "weight": 0, "tool_calls": [
        {"type": "function", "function": {"name": text, "arguments": {...}}}]}

Arguments are an object. A null value counts as a missing key, because Arrow and Parquet fill rows
with nulls. `*_problems` functions yield one line per error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorafold.data.json_input import json_type, parse_json

Message = dict[str, Any]
Tool = dict[str, Any]
Problems = Iterator[str]  # one line per error
Check = Callable[[str, Any], Problems]  # of a field: its name and value
REASONING = ("reasoning_content", "reasoning", "thinking")
LOSS_KEYS = ("weight", "train", "training", "loss")  # 0 or false: don't train on the turn
OPENAI_KEYS = frozenset(("role", "content", "tool_calls", "name", "tool_call_id"))
KNOWN_KEYS = OPENAI_KEYS | {"function_call", *REASONING, *LOSS_KEYS}
ROLES = {  # normalized roles by the names in data sets
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "ai", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
    **{name: name for name in ("system", "user", "assistant", "tool", "developer")},
}
CALL_ROLES = ("function_call", "tool_call")  # roles of turns whose value is a call as JSON
TURN_KEYS = {"from", "value", *LOSS_KEYS}


def type_problem(field: str, value: Any, expected: str) -> str:
    return f"field {field}: found {json_type(value)}, expected {expected}"


def text_problems(name: str, value: Any) -> Problems:
    if not isinstance(value, str):
        yield type_problem(name, value, "text")


def list_problems(name: str, value: Any, of: str, check: Check, empty: bool = False) -> Problems:
    if not isinstance(value, list):
        yield type_problem(name, value, f"a list of {of}")
    elif not value and not empty:
        yield f"field {name}: found an empty list, expected a list of {of}"
    else:
        for index, one in enumerate(value):
            yield from check(f"{name}[{index}]", one)


def message_problems(name: str, value: Any) -> Problems:
    return list_problems(name, value, "messages", _message_problems)


def _message_problems(field: str, message: Any) -> Problems:
    if not isinstance(message, dict):
        yield type_problem(field, message, "an object with role and content")
        return
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and isinstance(role, str) and isinstance(content, str):
        return  # the common case
    yield from text_problems(f"{field}.role", role)
    called, is_assistant = bool(_calls(message)), role_of(role) == "assistant"
    kinds = ("text", "thinking")[: 1 + is_assistant]
    yield from _content_problems(f"{field}.content", content, called, kinds)
    if called:
        key = "tool_calls" if message.get("tool_calls") else "function_call"
        check = call_problems if key == "tool_calls" else call_problem
        yield from check(f"{field}.{key}", message[key])
        if not is_assistant:
            yield f"field {field}.{key}: found with role {role}, expected role assistant"
    for key in REASONING:
        if message.get(key) is not None:
            yield from text_problems(f"{field}.{key}", message[key])
    yield from loss_key_problems(field, message)


def loss_key_problems(field: str, message: Message) -> Problems:
    for key in LOSS_KEYS:
        if message.get(key) not in (None, 0, 1):
            yield type_problem(f"{field}.{key}", message[key], "0, 1, false or true")


def trains(message: Message) -> bool | None:
    """Whether to train on a valid message, or None if it does not specify this."""
    flags = [bool(message[key]) for key in LOSS_KEYS if message.get(key) is not None]
    return all(flags) if flags else None


def role_of(name: Any) -> Any:
    return ROLES.get(name.strip().lower(), name) if isinstance(name, str) else name


def _calls(message: Message) -> list[Any]:
    single = message.get("function_call")
    return message.get("tool_calls") or [single] * (single is not None)


def _content_problems(name: str, value: Any, optional: bool, kinds: Sequence[str]) -> Problems:
    if not isinstance(value, list):
        if value is not None or not optional:
            yield from text_problems(name, value)
        return
    for index, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind is None:
            yield type_problem(f"{name}[{index}]", part, "a part of type text")
        elif kind not in kinds:
            expected = f"expected only {' and '.join(kinds)} parts"
            yield f"field {name}[{index}]: found a part of type {kind}, {expected}"
        else:
            yield from text_problems(f"{name}[{index}].{kind}", part.get(kind))


def call_problems(name: str, calls: Any) -> Problems:
    return list_problems(name, calls, "calls", call_problem, empty=True)


def call_problem(field: str, call: Any) -> Problems:
    expected = "an object with name and arguments"
    if isinstance(call, dict) and call.get("function") is not None:
        field, call, expected = f"{field}.function", call["function"], "an object"
    if not isinstance(call, dict):
        yield type_problem(field, call, expected)
        return
    yield from text_problems(f"{field}.name", call.get("name"))
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        if other := _json_problem(arguments, dict):
            yield f"field {field}.arguments: found {other}, expected JSON of an object"
    elif arguments is not None and not isinstance(arguments, dict):
        yield type_problem(f"{field}.arguments", arguments, "an object or its JSON text")


def parsed(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) else drop_nulls(value)


def tool_problems(value: Any) -> Problems:
    """Yields problems unless the value is a list of tools, its JSON text, or empty text."""
    if isinstance(value, str) and value.strip() and (other := _json_problem(value, list)):
        yield f"field tools: found {other}, expected JSON of a list of tools"
    else:
        yield from list_problems("tools", _parsed_tools(value), "tools", _tool_problems, True)


def _tool_problems(field: str, tool: Any) -> Problems:
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if isinstance(function, dict):
        yield from text_problems(f"{field}.name", function.get("name"))
    else:
        yield type_problem(field, function, "an object with a name")


def _parsed_tools(value: Any) -> Any:
    return [] if isinstance(value, str) and not value.strip() else parsed(value)


def messages_from(role: str, value: Any) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else normalize(value)


def normalize(messages: list[Message]) -> list[Message]:
    return [
        message
        if isinstance(message.get("content"), str)
        and "tool_calls" not in message
        and OPENAI_KEYS.issuperset(message)
        and ROLES.get(message["role"]) == message["role"]
        and None not in message.values()
        else _normalize(message)
        for message in messages
    ]


def openai_tools(value: Any) -> tuple[Tool, ...]:
    names = {"input_schema": "parameters"}  # of Anthropic
    tools = _parsed_tools(value or [])
    flat = ({names.get(key, key): of for key, of in tool.items()} for tool in tools)
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in flat)


def openai_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = parsed(function.get("arguments"))
    function = {"name": function["name"], "arguments": arguments or {}}
    more = {k: v for k, v in call.items() if v is not None and k not in ("name", "arguments")}
    return more | {"type": "function", "function": function}


def drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _normalize(message: Message) -> Message:
    result = {key: value for key, value in message.items() if value is not None}
    calls, trained = _calls(result), trains(result)
    for key in ("tool_calls", "function_call", *LOSS_KEYS):
        result.pop(key, None)
    result["role"] = role_of(result["role"])
    if trained is False and result["role"] == "assistant":
        result["weight"] = 0
    thoughts = [result.pop(key) for key in REASONING if key in result]
    if isinstance(result.get("content"), list):
        texts = {"text": "", "thinking": ""}
        for part in result["content"]:
            kind = part.get("type", "text")
            texts[kind] += part[kind]
        result["content"] = texts["text"]
        thoughts.append(texts["thinking"])
    if thoughts and thoughts[0]:
        result["reasoning_content"] = thoughts[0]
    if calls:
        result["tool_calls"] = list(map(openai_call, calls))
        if not result.get("content"):
            result.pop("content", None)
    return result


def _json_problem(text: str, kind: type) -> str:
    try:
        value = parse_json(text)
    except ValueError as error:
        return "text that is not JSON" if "not JSON" in str(error) else f"unusable JSON: {error}"
    return "" if isinstance(value, kind) else f"JSON of {json_type(value)}"


def turns_problems(name: str, turns: Any) -> Problems:
    return list_problems(name, turns, "turns", turn_problems)


def turn_problems(name: str, turn: Any) -> Problems:
    if not isinstance(turn, dict):
        yield type_problem(name, turn, "an object with from and value")
        return
    speaker, value = turn.get("from"), turn.get("value")
    yield from loss_key_problems(name, turn)
    if not isinstance(speaker, str) or not {speaker, role_of(speaker)} & {*CALL_ROLES, *ROLES}:
        roles = ", ".join((*ROLES, *CALL_ROLES))
        yield f"field {name}.from: found {speaker!r}, expected one of {roles}"
    yield from text_problems(f"{name}.value", value)
    if isinstance(speaker, str) and isinstance(value, str) and speaker in CALL_ROLES:
        try:
            calls = parse_json(value)
        except ValueError as error:
            yield f"field {name}.value: found invalid JSON ({error}), expected a call"
            return
        yield from call_problems(f"{name}.value", calls if isinstance(calls, list) else [calls])


def turns_to_messages(turns: list[dict[str, Any]]) -> list[Message]:
    messages = []
    for turn in turns:
        message = {"role": role_of(turn["from"]), "content": turn["value"]}
        if turn["from"] in CALL_ROLES:
            calls = parse_json(turn["value"])
            calls = calls if isinstance(calls, list) else [calls]
            message = {"role": "assistant", "tool_calls": calls}
        messages.append(message | {key: turn[key] for key in LOSS_KEYS if key in turn})
    return normalize(messages)
