"""Anthropic's messages: what is asked for, as the conversation that it is, and errors.

A user's turn may hold results of tools beside text; those are messages of their own here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.wire.body import Body, Listed
from lorafold.serving.wire.chat import Chat, chat_of, check_call

PATH = "/v1/messages"
NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
HINTS = {"type", "cache_control"}  # of tools and of blocks
TOOL = {"name", "description", "input_schema", "strict", "eager_input_streaming"} | HINTS
ROLES = ("user", "assistant", "system")
BLOCKS = {
    "text": {"text"} | HINTS,
    "tool_use": {"id", "name", "input", "caller"} | HINTS,
    "tool_result": {"tool_use_id", "content", "is_error"} | HINTS,
    "thinking": {"thinking", "signature"} | HINTS,
}


class Count(Body):
    """The body of `POST /v1/messages/count_tokens`: a request without what is about its answer."""

    model: str
    messages: Listed[dict[str, Any]]
    system: str | Listed[dict[str, Any]] = ""
    tools: Listed[dict[str, Any]] = Field(default_factory=list)
    tool_choice: dict[str, Any] = Field(default_factory=lambda: {"type": "auto"})
    thinking: dict[str, Any] = Field(default_factory=dict)
    output_config: dict[str, Any] = Field(default_factory=dict)

    @property
    def wishes(self) -> dict[str, Any]:
        """Variables of the chat template that ask for nothing where it does not know them."""
        return {"enable_thinking": False} if self.thinking else {}

    def chat(self) -> tuple[Chat, dict[str, str]]:
        """The same as a chat completion, and the names of its fields here. Raises Refusal for what
        is not supported.
        """
        if self.thinking and self.thinking.get("type") != "disabled":
            kind = self.thinking.get("type")
            raise wrong("thinking", f"found {kind!r:.80}, expected disabled, or no such field")
        given = list(self._conversation())
        tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)]
        names = NAMES | {f"messages[{i}]": where for i, (where, _) in enumerate(given)}
        for i in range(len(tools)):
            names[f"tools[{i}].function"] = f"tools[{i}]"
            names[f"tools[{i}].function.parameters"] = f"tools[{i}].input_schema"
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [message for _, message in given],
            "tools": tools,
            "tool_choice": self._choice(),
            "parallel_tool_calls": not self.tool_choice.get("disable_parallel_tool_use"),
            "response_format": self._format(),
        }
        return chat_of(asked | self._about_the_answer(), names), names

    def _about_the_answer(self) -> dict[str, Any]:
        return {}

    def _conversation(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The messages, each with the field that it comes from."""
        if self.system:
            yield "system", {"role": "system", "content": _text(self.system, "system")}
        names: dict[str, str] = {}
        for i, message in enumerate(self.messages):
            where, role = f"messages[{i}]", message.get("role")
            if role not in ROLES:
                told = f"found {role!r:.80}, expected one of {', '.join(ROLES)}"
                raise wrong(f"{where}.role", told)
            _known(message, {"role", "content"}, where)
            for said in _turn(role, message.get("content"), f"{where}.content", names):
                yield where, said
        if self.messages and self.messages[-1]["role"] == "assistant":
            told = "found the assistant's at the end, expected the user's: none is continued here"
            raise wrong("messages", told)

    def _choice(self) -> str | dict[str, Any]:
        kind = self.tool_choice.get("type")
        if kind == "tool":
            return {"type": "function", "function": {"name": self.tool_choice.get("name")}}
        if not isinstance(kind, str) or kind not in CHOICES:
            raise wrong("tool_choice.type", f"found {kind!r:.80}, expected auto, any, tool or none")
        return CHOICES[kind]

    def _format(self) -> dict[str, Any]:
        _known(self.output_config, {"format"}, "output_config")
        return self.output_config.get("format") or {"type": "text"}


class Ask(Count):
    """The body of `POST /v1/messages`."""

    max_tokens: int
    stop_sequences: Listed[str] = Field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stream: bool = False

    def _about_the_answer(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
        }


def error(refusal: Refusal, id: str) -> dict[str, Any]:
    """A refusal in Anthropic's shape.

    Args:
        id: the server's name of the request.
    """
    told, long = refusal.message, refusal.code == "context_length_exceeded"
    kind = KINDS.get(refusal.status)
    kind = kind or ("api_error" if refusal.status >= 500 else "invalid_request_error")
    # the first words are those by which clients know this error
    about: dict[str, Any] = {"type": kind}
    about["message"] = f"prompt is too long: {told}" if long else told
    if refusal.param == "thread":  # after which clients send the whole conversation each time
        about["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": about, "request_id": id}


def _turn(role: str, content: Any, where: str, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The messages of one turn; `names` has those of the calls so far, by id."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not blocks:
        raise wrong(where, "expected text or a list of blocks")
    said: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        kind, at = block.get("type") if isinstance(block, Mapping) else None, f"{where}[{i}]"
        if isinstance(kind, str) and kind in BLOCKS:
            _known(block, BLOCKS[kind], at)
        if kind == "text":
            said["content"] = said.get("content", "") + _text([block], where, i)
        elif kind == "tool_result" and role == "user":
            if said:
                yield {"role": role} | said
                said = {}
            id, found = str(block.get("tool_use_id")), block.get("content") or ""
            told = {"tool_call_id": id, "name": names.get(id, "")}
            yield {"role": "tool"} | told | {"content": _text(found, f"{at}.content")}
        elif kind == "tool_use" and role == "assistant":
            id, name = str(block.get("id")), block.get("name")
            function = {"name": name, "arguments": block.get("input")}
            check_call(function, at, "input")
            names[id] = str(name)
            call = {"id": id, "type": "function", "function": function}
            said.setdefault("tool_calls", []).append(call)
        elif kind == "thinking" and role == "assistant":
            said["reasoning_content"] = block.get("thinking")
        else:
            raise wrong(f"{at}.type", f"found {kind!r:.80} of the {role}, which is not supported")
    if said:
        yield {"role": role} | said


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    if (tool.get("type") or "custom") != "custom":
        raise wrong(f"{where}.type", f"found {tool['type']!r:.80}, expected custom")
    _known(tool, TOOL, where)
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    told = {} if tool.get("description") is None else {"description": tool["description"]}
    return {"type": "function", "function": function | told}


def _text(content: Any, where: str, first: int = 0) -> str:
    """A text, or blocks of text joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, "expected text or a list of blocks")
    for i, block in enumerate(content, first):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise wrong(f"{where}[{i}]", f"found a block of type {kind!r:.80}, expected text")
    return "".join(block["text"] for block in content)


def _known(given: Mapping[str, Any], keys: set[str], where: str) -> None:
    """Raise Refusal for a key that is not known and asks for something."""
    for key in given.keys() - keys:
        if given[key] not in (None, False, []):
            told = f"{where}.{key[:80]}: it is not supported"
            raise Refusal(400, "unsupported_parameter", told, f"{where}.{key[:80]}")
