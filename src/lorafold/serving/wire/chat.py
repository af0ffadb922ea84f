"""Chat completions: what is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from lorafold.data.messages import (
    REASONING,
    Message,
    Tool,
    message_problems,
    normalized,
    tool_problems,
    tools_of,
)
from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.settings import Limits
from lorafold.serving.wire.body import Completing

FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "annotations", *REASONING}
ROLES = ("system", "developer", "user", "assistant", "tool")


class Chat(Completing):
    """The body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The most tokens of the completion, or None."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def variables(self) -> dict[str, Any]:
        """Further variables of the chat template."""
        effort = self.reasoning_effort
        return ({} if effort is None else {"reasoning_effort": effort}) | self.chat_template_kwargs

    def conversation(self, limits: Limits) -> list[Message]:
        """The messages in one form. Raises Refusal for what is wrong with them."""
        if len(self.messages) > limits.messages:
            told = f"found {len(self.messages)} of them, expected at most {limits.messages}"
            raise wrong("messages", told)
        if problems := list(message_problems("messages", self.messages)):
            field, _, told = problems[0].removeprefix("field ").partition(": ")
            raise wrong(field, told)
        for i, message in enumerate(self.messages):
            for name in message.keys() - FIELDS:
                if message[name] is not None:
                    field = f"messages[{i}].{name[:80]}"
                    told = f"{field}: it is not supported"
                    raise Refusal(400, "unsupported_parameter", told, field)
            if message["role"] not in ROLES:
                told = f"found {message['role'][:40]!r}, expected one of {', '.join(ROLES)}"
                raise wrong(f"messages[{i}].role", told)
        plain = [
            message | {"role": "system"} if message["role"] == "developer" else message
            for message in self.messages
        ]
        return normalized(plain)

    def offered(self, limits: Limits) -> tuple[Tool, ...]:
        """The tools, none where none may be called. Raises Refusal for what is wrong with them."""
        if len(self.tools) > limits.tools:
            told = f"found {len(self.tools)} of them, expected at most {limits.tools}"
            raise wrong("tools", told)
        if problems := list(tool_problems(self.tools)):
            field, _, told = problems[0].removeprefix("field ").partition(": ")
            raise wrong(field, told)
        for i, tool in enumerate(self.tools):
            if tool.get("type", "function") != "function":
                raise wrong(f"tools[{i}].type", f"found {tool['type']!r}, expected function")
        return () if self.tool_choice == "none" else tools_of(self.tools)

    def forced(self) -> Sequence[str] | None:
        """The tools of which one has to be called; None if the model is free."""
        names = [tool.get("function", tool)["name"] for tool in self.tools]
        choice = self.tool_choice
        if choice in ("auto", "none"):
            return None
        if isinstance(choice, Mapping):
            function = choice.get("function")
            name = (function if isinstance(function, Mapping) else choice).get("name")
            if choice.get("type") != "function" or name not in names:
                raise wrong("tool_choice", f"found {name!r}, expected the name of a tool")
            return [str(name)]
        if choice != "required" or not names:
            expected = "auto, none, required or a function" if names else "auto, without tools"
            raise wrong("tool_choice", f"found {choice!r}, expected {expected}")
        return names

    def json_schema(self) -> str | None:
        """The JSON schema of the completion, None if it is free. Raises Refusal for a format that
        is not known.
        """
        return schema_of(self.response_format, "response_format")


def schema_of(form: Mapping[str, Any], field: str) -> str | None:
    """The schema that a format asks for, None for text. Raises Refusal for any other format.

    Args:
        form: the format.
        field: where it stands.
    """
    kind = form.get("type")
    known = {"json_schema", "name", "schema", "strict", "description"}
    for name in form.keys() - {"type", *(known if kind == "json_schema" else ())}:
        told = f"{field}.{name[:80]}: it is not supported"
        raise Refusal(400, "unsupported_parameter", told, field)
    if kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    inner = form.get("json_schema", form)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        expected = "text, json_object, or json_schema with a schema"
        raise Refusal(400, "invalid_value", f"{field}: found {kind!r}, expected {expected}", field)
    return json.dumps(schema)
