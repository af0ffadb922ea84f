"""Responses: what is asked for, as the conversation that it is.

Nothing is kept between requests, so that fields that name an earlier response are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, ValidationError

from lorafold.serving.refusal import wrong
from lorafold.serving.wire.body import Body, StreamOptions
from lorafold.serving.wire.chat import Chat

TEXTS = ("input_text", "output_text", "text", "reasoning_text")


class Respond(Body):
    """The body of `POST /v1/responses`."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field(default_factory=dict)
    reasoning: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def chat(self) -> Chat:
        """The same as a chat completion. Raises Refusal for an item that is not supported."""
        told = self.instructions
        given = [] if told is None else [{"role": "system", "content": told}]
        asked = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else []
        items = [] if isinstance(self.input, str) else self.input
        for name, values, known in (
            ("text", self.text, ("format",)), ("reasoning", self.reasoning, ("effort",)),
        ):  # fmt: skip
            for key in (k for k, v in values.items() if v is not None and k not in known):
                raise wrong(f"{name}.{key}", "it is not supported here")
        tools = []
        for i, tool in enumerate(self.tools):
            if tool.get("type") != "function":
                raise wrong(f"tools[{i}].type", f"found {tool.get('type')!r}, expected function")
            kept = ("name", "description", "parameters", "strict")
            tools.append({"type": "function", "function": {k: tool[k] for k in kept if k in tool}})
        given_format = self.text.get("format") or {"type": "text"}
        try:
            return self._chat([*given, *asked, *_messages(items)], tools, given_format)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise wrong(".".join(map(str, first["loc"])), first["msg"].lower()) from None

    def _chat(self, messages: list[Any], tools: list[Any], given_format: Any) -> Chat:
        return Chat(
            model=self.model,
            messages=messages,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=given_format,
            reasoning_effort=self.reasoning.get("effort"),
            stream=self.stream,
        )


def _messages(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The items as messages; calls and reasoning belong to the assistant's message they are in."""
    names: dict[str, str] = {}
    turn: dict[str, Any] = {}
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        assistant = kind in ("function_call", "reasoning") or item.get("role") == "assistant"
        if turn and (not assistant or (kind == "message" and "content" in turn)):
            yield turn
            turn = {}
        if assistant and not turn:
            turn = {"role": "assistant"}
        if kind == "message" and assistant:
            turn["content"] = _text(item.get("content"), f"input[{i}].content")
        elif kind == "message":
            text = _text(item.get("content"), f"input[{i}].content")
            yield {"role": item.get("role"), "content": text}
        elif kind == "function_call":
            name, id = item.get("name"), str(item.get("call_id"))
            names[id] = str(name)
            function = {"name": name, "arguments": item.get("arguments")}
            calls = turn.setdefault("tool_calls", [])
            calls.append({"id": id, "type": "function", "function": function})
        elif kind == "function_call_output":
            id = str(item.get("call_id"))
            text = _text(item.get("output"), f"input[{i}].output")
            yield {"role": "tool", "tool_call_id": id, "name": names.get(id, ""), "content": text}
        elif kind == "reasoning":
            if item.get("encrypted_content"):
                raise wrong(f"input[{i}].encrypted_content", "it can't be read here")
            content = _text(item.get("content") or [], f"input[{i}].content")
            turn["reasoning_content"] = content
        else:
            raise wrong(f"input[{i}].type", f"found {kind!r}, which is not supported here")
    if turn:
        yield turn


def _text(content: Any, where: str) -> Any:
    """Parts of text joined; what is no list is checked as a message is."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXTS or not isinstance(part.get("text"), str):
            raise wrong(f"{where}[{i}]", f"found a part of type {kind!r}, expected text alone")
    return "".join(part["text"] for part in content)
