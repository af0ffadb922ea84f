"""`POST /v1/messages`, Anthropic's API. Tool results in a user's turn become separate messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.serving.chat import ChatBody, GeneratedMessage, NextTurn, as_call, as_chat, join_text
from lorafold.serving.completion_job import REASONING, Reply, Usage
from lorafold.serving.refusals import MESSAGES_PATH, invalid, unsupported_field
from lorafold.serving.request_body import Body, ListOf, sse_event
from lorafold.serving.server import Dialect, Server, json_response

Block = dict[str, Any]
NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
IGNORED = {"type", "cache_control"}  # ignored in tools and blocks
TOOL_KEYS = {"name", "description", "input_schema", "strict", "eager_input_streaming"} | IGNORED
ROLES = ("user", "assistant", "system")
BLOCK_KEYS = {
    "text": {"text"} | IGNORED,
    "tool_use": {"id", "name", "input", "caller"} | IGNORED,
    "tool_result": {"tool_use_id", "content", "is_error"} | IGNORED,
    "thinking": {"thinking", "signature"} | IGNORED,
}
NOT_TEXT_MESSAGE = "found a block of type {}, expected a text block with a string"
STOP_REASONS = {"end": "end_turn", "length": "max_tokens", "stop": "stop_sequence"}
# (type of deltas, field) by type of block
DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


def routes(app: FastAPI, server: Server) -> None:
    @app.post(MESSAGES_PATH)
    async def messages(request: Request) -> Response:
        """Generates the next message of a conversation, in Anthropic's format."""
        return await server.complete(request, MessagesBody, next_turn, MessagesReply, "msg")

    @app.post(f"{MESSAGES_PATH}/count_tokens")
    async def count(request: Request) -> Response:
        """Counts the tokens of a conversation."""
        return json_response({"input_tokens": await server.count(request, CountTokens, next_turn)})


class CountTokens(Body):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: ListOf[dict[str, Any]]
    system: str | ListOf[dict[str, Any]] = ""
    tools: ListOf[dict[str, Any]] = Field(default_factory=list)
    tool_choice: dict[str, Any] = Field(default_factory=lambda: {"type": "auto"})
    thinking: dict[str, Any] = Field(default_factory=dict)
    output_config: dict[str, Any] = Field(default_factory=dict)

    def chat(self) -> tuple[ChatBody, dict[str, str]]:
        """Converts the body to a chat completion. Also returns the fields' names in this API."""
        if self.thinking and (kind := self.thinking.get("type")) != "disabled":
            raise invalid("thinking", f"found {kind!r:.80}, expected disabled; or remove the field")
        conversation = list(self._conversation())
        tools, names = [], dict(NAMES)
        for i, tool in enumerate(self.tools):
            if (tool.get("type") or "custom") != "custom":
                raise invalid(f"tools[{i}].type", f"found {tool['type']!r:.80}, expected custom")
            _check_keys(tool, TOOL_KEYS, f"tools[{i}]")
            names[f"tools[{i}].function.parameters"] = f"tools[{i}].input_schema"
            function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
            if tool.get("description") is not None:
                function["description"] = tool["description"]
            tools.append({"type": "function", "function": function})
        choice = self._choice()
        _check_keys(self.output_config, {"format"}, "output_config")
        parallel = not self.tool_choice.get("disable_parallel_tool_use")
        return as_chat(
            self, conversation, tools, names,
            tool_choice=choice, parallel_tool_calls=parallel,
        )  # fmt: skip

    def _conversation(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.system:
            yield "system", {"role": "system", "content": _text(self.system, "system")}
        names: dict[str, str] = {}
        for i, message in enumerate(self.messages):
            where, role = f"messages[{i}]", message.get("role")
            if role not in ROLES:
                expected = f"expected one of {', '.join(ROLES)}"
                raise invalid(f"{where}.role", f"found {role!r:.80}, {expected}")
            _check_keys(message, {"role", "content"}, where)
            for part in _turn(role, message.get("content"), f"{where}.content", names):
                yield where, part
        if self.messages and self.messages[-1]["role"] == "assistant":
            expected = "expected a user message, since answers can't be prefilled"
            raise invalid("messages", f"found an assistant message at the end, {expected}")

    def _choice(self) -> str | dict[str, Any]:
        kind = self.tool_choice.get("type")
        if kind == "tool":
            return {"type": "function", "function": {"name": self.tool_choice.get("name")}}
        if not isinstance(kind, str) or kind not in CHOICES:
            expected = "expected auto, any, tool or none"
            raise invalid("tool_choice.type", f"found {kind!r:.80}, {expected}")
        return CHOICES[kind]


class MessagesBody(CountTokens):
    """The body of `POST /v1/messages`."""

    max_tokens: int
    stop_sequences: ListOf[str] = Field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stream: bool = False


def next_turn(server: Server, body: CountTokens) -> NextTurn:
    # clients can only disable `thinking`; the variable is dropped if the template doesn't use it
    wishes = {"enable_thinking": False} if body.thinking else None
    return NextTurn(server, *body.chat(), wishes=wishes)


class MessagesReply(Dialect):
    body: MessagesBody
    request: NextTurn

    async def full_answer(self, reply: Reply) -> dict[str, Any]:
        [message] = await self.request.collect_messages(reply)
        content = [_text_block(field, text) for field, text in message.texts.items()]
        content += [_call_block(call) for call in message.calls]
        return self._message(reply, content) | self._end(reply, message)

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        # text is streamed in pieces, and each call in one piece
        usage = _usage(Usage(len(reply.jobs[0].request.prompt), 0, 0))
        yield _event("message_start", message=self._message(reply, []) | {"usage": usage})
        message, at, open = GeneratedMessage(), -1, ""
        async for delta in self.request.deltas(reply):
            message.add(delta)
            for field, text in delta.texts.items():
                block = _text_block(field, "")
                if field != open:
                    if open:
                        yield _event("content_block_stop", index=at)
                    at, open = at + 1, field
                    yield _event("content_block_start", index=at, content_block=block)
                yield _delta(at, block["type"], text)
        if open:
            yield _event("content_block_stop", index=at)
        for call in message.calls:
            at += 1
            block = _call_block(call) | {"input": {}}
            yield _event("content_block_start", index=at, content_block=block)
            yield _delta(at, "tool_use", call["function"]["arguments"])
            yield _event("content_block_stop", index=at)
        ended = self._end(reply, message)
        usage = ended.pop("usage")
        yield _event("message_delta", delta=ended, usage=usage)
        yield _event("message_stop")

    def _message(self, reply: Reply, content: list[Block]) -> dict[str, Any]:
        return {
            "id": reply.id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _end(self, reply: Reply, message: GeneratedMessage) -> dict[str, Any]:
        end, stop = message.end, None
        if end.reason == "stop":  # the text after the completion starts with the stop sequence
            after = reply.resolved.chosen.renderer.text(end.tokens)[len(end.text) :]
            stop = next((text for text in self.body.stop_sequences if after.startswith(text)), None)
        return {
            "stop_reason": "tool_use" if message.calls else STOP_REASONS[end.reason],
            "stop_sequence": stop,
            "usage": _usage(reply.usage),
        }


def _text_block(field: str, text: str) -> Block:
    if field == REASONING:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _call_block(call: Block) -> Block:
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    return {"type": "tool_use", "id": call["id"], "name": name, "input": arguments}


def _delta(at: int, kind: str, text: str) -> bytes:
    name, field = DELTAS[kind]
    return _event("content_block_delta", index=at, delta={"type": name, field: text})


def _event(kind: str, **fields: Any) -> bytes:
    return sse_event({"type": kind} | fields, kind)


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt - usage.cached, "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0, "output_tokens": usage.completion,
    }  # fmt: skip


def _turn(role: str, content: Any, where: str, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not blocks:
        raise invalid(where, "expected a string, or at least one content block in a list")
    message: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        kind, at = block.get("type") if isinstance(block, Mapping) else None, f"{where}[{i}]"
        if isinstance(kind, str) and kind in BLOCK_KEYS:
            _check_keys(block, BLOCK_KEYS[kind], at)
        if kind == "text":
            text = join_text([block], ("text",), at, NOT_TEXT_MESSAGE)
            message["content"] = message.get("content", "") + text
        elif kind == "tool_result" and role == "user":
            if message:
                yield {"role": role} | message
                message = {}
            id, text = str(block.get("tool_use_id")), _text(block.get("content"), f"{at}.content")
            result = {"tool_call_id": id, "name": names.get(id, ""), "content": text}
            yield {"role": "tool"} | result
        elif kind == "tool_use" and role == "assistant":
            name = block.get("name")
            call = as_call(block.get("id"), name, block.get("input"), at, "input")
            names[call["id"]] = str(name)
            message.setdefault("tool_calls", []).append(call)
        elif kind == "thinking" and role == "assistant":
            message["reasoning_content"] = block.get("thinking")
        else:
            raise invalid(f"{at}.type", f"{kind!r:.80} is not supported in {role} messages")
    if message:
        yield {"role": role} | message


def _text(content: Any, where: str) -> str:
    if not content or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise invalid(where, "expected a string or a list of content blocks")
    return join_text(content, ("text",), where + "[{}]", NOT_TEXT_MESSAGE)


def _check_keys(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises for unknown keys, unless their value has no effect."""
    for key in fields.keys() - known:
        if fields[key] not in (None, False, []):
            raise unsupported_field(f"{where}.{key[:80]}")
