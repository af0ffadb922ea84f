"""The messages of a conversation and its tools: what is wrong with them, and one form for all.

    {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [
        {"type": "function", "function": {"name": text, "arguments": {...}}}]}

That is OpenAI's form, with arguments as an object. Rows may also have arguments as JSON text, flat
calls {"name", "arguments"}, content as a list of text parts (joined with nothing between), and
reasoning under `reasoning` or `thinking`. A key whose value is null counts as absent, in tools and
arguments too, since Arrow and Parquet fill rows up with nulls; JSON text keeps its nulls.
"""

import json
from collections.abc import Iterator
from typing import Any

from lorafold.data.sources import kind_of

Message = dict[str, Any]
Tool = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")


def text_problems(name: str, value: Any) -> Iterator[str]:
    """What is wrong with a field that has to be text."""
    if not isinstance(value, str):
        yield f"field {name}: found {kind_of(value)}, expected text"


def list_problems(name: str, value: Any, of: str) -> Iterator[str]:
    """What is wrong with a field that has to be a list with something in it.

    Args:
        of: What the list is expected to hold, for the message.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        yield f"field {name}: found {found}, expected a list of {of}"


def message_problems(name: str, value: Any) -> Iterator[str]:
    """What is wrong with a list of messages, each with the field that it concerns."""
    if any(wrong := list(list_problems(name, value, "messages"))):
        yield from wrong
        return
    for index, message in enumerate(value):
        field = f"{name}[{index}]"
        if not isinstance(message, dict):
            found = kind_of(message)
            yield f"field {field}: found {found}, expected an object with role and content"
            continue
        yield from text_problems(f"{field}.role", message.get("role"))
        calls = message.get("tool_calls")
        yield from _content(f"{field}.content", message.get("content"), bool(calls))
        if calls:
            yield from call_problems(f"{field}.tool_calls", calls)
            if message.get("role") != "assistant":
                role = message.get("role")
                yield f"field {field}.tool_calls: found in a {role} message, expected assistant"
        for key in REASONING:
            if message.get(key) is not None:
                yield from text_problems(f"{field}.{key}", message[key])


def _content(name: str, value: Any, optional: bool) -> Iterator[str]:
    """What is wrong with a content: text, a list of text parts, or nothing where it is optional."""
    if not isinstance(value, list):
        if value is not None or not optional:
            yield from text_problems(name, value)
        return
    for index, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind is None:
            yield f"field {name}[{index}]: found {kind_of(part)}, expected a part of type text"
        elif kind != "text":
            yield f"field {name}[{index}]: found a part of type {kind}, expected text alone"
        else:
            yield from text_problems(f"{name}[{index}].text", part.get("text"))


def call_problems(name: str, calls: Any) -> Iterator[str]:
    """What is wrong with a list of calls, in OpenAI's form or flat."""
    if not isinstance(calls, list):
        yield f"field {name}: found {kind_of(calls)}, expected a list of calls"
        return
    for index, call in enumerate(calls):
        field = f"{name}[{index}]"
        if not isinstance(call, dict):
            found = kind_of(call)
            yield f"field {field}: found {found}, expected an object with name and arguments"
            continue
        if call.get("function") is not None:
            field, call = f"{field}.function", call["function"]
            if not isinstance(call, dict):
                yield f"field {field}: found {kind_of(call)}, expected an object"
                continue
        yield from text_problems(f"{field}.name", call.get("name"))
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments)
            if not isinstance(arguments, dict):
                found = "no JSON" if arguments is None else f"JSON of {kind_of(arguments)}"
                yield f"field {field}.arguments: found {found}, expected JSON of an object"
        elif arguments is not None and not isinstance(arguments, dict):
            yield (
                f"field {field}.arguments: found {kind_of(arguments)}, expected an object or JSON"
                " of one"
            )


def tool_problems(value: Any) -> Iterator[str]:
    """What is wrong with a row's tools: a list of JSON schemas, or JSON text of one; an empty text
    has none.
    """
    if isinstance(value, str):
        if not value.strip():
            return
        read = _json(value)
        if not isinstance(read, list):
            found = "no JSON" if read is None else f"JSON of {kind_of(read)}"
            yield f"field tools: found {found}, expected JSON of a list of tools"
            return
        value = read
    if not isinstance(value, list):
        yield f"field tools: found {kind_of(value)}, expected a list of tools"
        return
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict):
            yield f"field tools[{index}]: found {kind_of(function)}, expected an object with a name"
        elif not isinstance(function.get("name"), str):
            yield from text_problems(f"tools[{index}].name", function.get("name"))


def normalized(messages: list[Message]) -> list[Message]:
    """The messages of a checked row in one form; those that have it already are not copied."""
    return [_normalized(message) if _unusual(message) else message for message in messages]


def tools_of(value: Any) -> tuple[Tool, ...]:
    """The tools of a checked row in OpenAI's form: {"type": "function", "function": {...}}."""
    if isinstance(value, str):
        tools = json.loads(value) if value.strip() else []
    else:
        tools = without_nulls(value or [])
    return tuple(
        {"type": "function", "function": tool} if "function" not in tool else tool for tool in tools
    )


def call_of(call: dict[str, Any]) -> dict[str, Any]:
    """One call in OpenAI's form, with arguments as an object, and its other keys, such as id."""
    function = call.get("function") or call
    arguments = function.get("arguments")
    arguments = json.loads(arguments) if isinstance(arguments, str) else without_nulls(arguments)
    wanted = {"name": function["name"], "arguments": arguments or {}}
    more = {k: v for k, v in call.items() if v is not None and k not in ("name", "arguments")}
    return more | {"type": "function", "function": wanted}


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects, at any depth, whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _unusual(message: Message) -> bool:
    """Whether a message has more than text, or a key that counts as absent."""
    return (
        not isinstance(message.get("content"), str)
        or "tool_calls" in message
        or any(key in message for key in REASONING)
        or None in message.values()
    )


def _normalized(message: Message) -> Message:
    found = {key: value for key, value in message.items() if value is not None}
    content, calls = found.get("content"), found.pop("tool_calls", None)
    if isinstance(content, list):
        found["content"] = "".join(part["text"] for part in content)
    thoughts = [found.pop(key) for key in REASONING if key in found]
    if thoughts and thoughts[0]:
        found["reasoning_content"] = thoughts[0]
    if calls:
        found["tool_calls"] = [call_of(call) for call in calls]
        if not found.get("content"):
            found.pop("content", None)
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
