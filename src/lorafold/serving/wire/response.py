"""Responses: what is asked for, as the conversation that it is.

Nothing is kept between requests, so that fields that name an earlier response are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from lorafold.serving.refusal import wrong
from lorafold.serving.wire.body import Body, Listed, StreamOptions
from lorafold.serving.wire.chat import Chat, chat_of, check_call

TEXTS = ("input_text", "output_text", "text", "reasoning_text")
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")  # of the second there is none
PAIRS, KEY, VALUE = 16, 64, 512  # OpenAI's limits of metadata
NAMES = {
    "messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format",
    "reasoning_effort": "reasoning.effort", "verbosity": "text.verbosity",
}  # fmt: skip


class Count(Body):
    """The body of `POST /v1/responses/input_tokens`: a request without what is about its answer."""

    model: str
    input: str | Listed[dict[str, Any]]
    instructions: str | None = None
    tools: Listed[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field(default_factory=dict)
    reasoning: dict[str, Any] = Field(default_factory=dict)
    truncation: Literal["auto", "disabled"] = "disabled"

    def chat(self) -> tuple[Chat, dict[str, str]]:
        """The same as a chat completion, and the names of its fields here. Raises Refusal for an
        item that is not supported.
        """
        told = self.instructions
        given: list[tuple[str, dict[str, Any]]]
        given = [] if told is None else [("instructions", {"role": "system", "content": told})]
        if isinstance(self.input, str):
            given.append(("input", {"role": "user", "content": self.input}))
        else:
            given += _messages(self.input)
        if (summary := self.reasoning.get("summary")) not in (None, "auto"):
            raise wrong("reasoning.summary", f"found {summary!r:.80}, expected auto: there is none")
        for name, values, known in (
            ("text", self.text, ("format", "verbosity")),
            ("reasoning", self.reasoning, ("effort", "summary")),
        ):
            for key in (k for k, v in values.items() if v is not None and k not in known):
                raise wrong(f"{name}.{key}", "it is not supported here")
        tools = []
        for i, tool in enumerate(self.tools):
            if tool.get("type") != "function":
                raise wrong(f"tools[{i}].type", f"found {tool.get('type')!r}, expected function")
            kept = ("name", "description", "parameters", "strict")
            tools.append({"type": "function", "function": {k: tool[k] for k in kept if k in tool}})
        names = NAMES | {f"messages[{i}]": where for i, (where, _) in enumerate(given)}
        names |= {f"tools[{i}].function": f"tools[{i}]" for i in range(len(tools))}
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [message for _, message in given],
            "tools": tools,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.get("format") or {"type": "text"},
            "reasoning_effort": self.reasoning.get("effort"),
            "verbosity": self.text.get("verbosity"),
        }
        return chat_of(asked | self._about_the_answer(), names), names

    def _about_the_answer(self) -> dict[str, Any]:
        return {}


class Respond(Count):
    """The body of `POST /v1/responses`."""

    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    include: Listed[str] = Field(default_factory=list)
    top_logprobs: int = 0
    metadata: dict[str, str] = Field(default_factory=dict)

    @property
    def logprobs(self) -> bool:
        """Whether log probabilities are asked for."""
        return LOGPROBS in self.include

    def _about_the_answer(self) -> dict[str, Any]:
        for i, name in enumerate(self.include):
            if name not in INCLUDED:
                expected = " or ".join(INCLUDED)
                raise wrong(f"include[{i}]", f"found {name[:80]!r}, expected {expected}")
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", f"found it without include, expected {LOGPROBS} in that")
        if len(self.metadata) > PAIRS:
            told = f"found {len(self.metadata)} pairs, expected at most {PAIRS}"
            raise wrong("metadata", told)
        for key, value in self.metadata.items():
            if len(key) > KEY or len(value) > VALUE:
                told = f"expected a key of at most {KEY} characters and a value of at most {VALUE}"
                raise wrong(f"metadata.{key[:KEY]}", told)
        return {
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs if self.logprobs else None,
        }


def _messages(items: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The items as messages, each with the item where it begins; calls and reasoning belong to the
    assistant's message they are in.
    """
    names: dict[str, str] = {}
    turn: dict[str, Any] = {}
    begun = ""
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        assistant = kind in ("function_call", "reasoning") or item.get("role") == "assistant"
        if turn and (not assistant or (kind == "message" and "content" in turn)):
            yield begun, turn
            turn = {}
        if assistant and not turn:
            begun, turn = f"input[{i}]", {"role": "assistant"}
        if kind == "message" and assistant:
            turn["content"] = _text(item.get("content"), f"input[{i}].content")
        elif kind == "message":
            text = _text(item.get("content"), f"input[{i}].content")
            yield f"input[{i}]", {"role": item.get("role"), "content": text}
        elif kind == "function_call":
            name, id = item.get("name"), str(item.get("call_id"))
            names[id] = str(name)
            function = {"name": name, "arguments": item.get("arguments")}
            check_call(function, f"input[{i}]")
            calls = turn.setdefault("tool_calls", [])
            calls.append({"id": id, "type": "function", "function": function})
        elif kind == "function_call_output":
            id = str(item.get("call_id"))
            text = _text(item.get("output"), f"input[{i}].output")
            said = {"tool_call_id": id, "name": names.get(id, ""), "content": text}
            yield f"input[{i}]", {"role": "tool"} | said
        elif kind == "reasoning":
            if item.get("encrypted_content"):
                raise wrong(f"input[{i}].encrypted_content", "it can't be read here")
            content = _text(item.get("content") or [], f"input[{i}].content")
            turn["reasoning_content"] = content
        else:
            raise wrong(f"input[{i}].type", f"found {kind!r}, which is not supported here")
    if turn:
        yield begun, turn


def _text(content: Any, where: str) -> Any:
    """Parts of text joined; what is no list is checked as a message is."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXTS or not isinstance(part.get("text"), str):
            raise wrong(f"{where}[{i}]", f"found a part of type {kind!r}, expected text alone")
    return "".join(part["text"] for part in content)
