"""`POST /v1/responses`. Responses are not stored, so a field that refers to an earlier response is
an error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.data.messages import drop_nulls
from lorafold.serving.backend import Token
from lorafold.serving.chat import ChatBody, GeneratedMessage, NextTurn, as_call, as_chat, join_text
from lorafold.serving.completion_job import CONTENT, REASONING, Reply
from lorafold.serving.refusals import invalid
from lorafold.serving.request_body import Body, ListOf, StreamOptions, new_id, sse_event
from lorafold.serving.server import Dialect, Server, json_response

Item = dict[str, Any]
PARTS = ("input_text", "output_text", "text", "reasoning_text")
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")  # the second has no effect
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # OpenAI's limits on metadata
NAMES = {
    "messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format",
    "reasoning_effort": "reasoning.effort", "verbosity": "text.verbosity",
}  # fmt: skip
RETURNED_FIELDS = {  # fields of the request that the response repeats
    "instructions", "max_output_tokens", "metadata", "model", "parallel_tool_calls", "temperature",
    "tool_choice", "tools", "top_logprobs", "top_p", "truncation",
}  # fmt: skip
ITEM_BY_FIELD = {REASONING: "reasoning", CONTENT: "message"}
EVENT_BY_ITEM = {"reasoning": "reasoning_text", "message": "output_text"}  # events by type of item


def routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """Generates the next message and calls of a conversation given as items."""
        return await server.complete(request, ResponsesBody, next_turn, ResponsesReply, "resp")

    @app.post("/v1/responses/input_tokens")
    async def count(request: Request) -> Response:
        """Counts the tokens of a conversation."""
        tokens = await server.count(request, InputTokens, next_turn)
        return json_response({"object": "response.input_tokens", "input_tokens": tokens})


class InputTokens(Body):
    """The body of `POST /v1/responses/input_tokens`."""

    model: str
    input: str | ListOf[dict[str, Any]]
    instructions: str | None = None
    tools: ListOf[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field(default_factory=dict)
    reasoning: dict[str, Any] = Field(default_factory=dict)
    truncation: Literal["auto", "disabled"] = "disabled"

    def chat(self, **more: Any) -> tuple[ChatBody, dict[str, str]]:
        """Converts the body to a chat completion. Also returns the fields' names in this API."""
        conversation = []
        if self.instructions is not None:
            conversation.append(("instructions", {"role": "system", "content": self.instructions}))
        if isinstance(self.input, str):
            conversation.append(("input", {"role": "user", "content": self.input}))
        else:
            conversation += _messages(self.input)
        if (summary := self.reasoning.get("summary")) not in (None, "auto"):
            message = f"found {summary!r:.80}, expected auto, since no summary is generated"
            raise invalid("reasoning.summary", message)
        for name, values, known in (
            ("text", self.text, ("format", "verbosity")),
            ("reasoning", self.reasoning, ("effort", "summary")),
        ):
            for key in (k for k, v in values.items() if v is not None and k not in known):
                raise invalid(f"{name}.{key}", "this field is not supported; remove it")
        tools = []
        for i, tool in enumerate(self.tools):
            if tool.get("type") != "function":
                raise invalid(f"tools[{i}].type", f"found {tool.get('type')!r}, expected function")
            fields = ("name", "description", "parameters", "strict")
            function = {name: tool[name] for name in fields if name in tool}
            tools.append({"type": "function", "function": function})
        return as_chat(self, conversation, tools, NAMES, **more)


class ResponsesBody(InputTokens):
    """The body of `POST /v1/responses`."""

    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    include: ListOf[str] = Field(default_factory=list)
    top_logprobs: int = 0
    metadata: dict[str, str] = Field(default_factory=dict)

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in self.include

    def chat(self, **more: Any) -> tuple[ChatBody, dict[str, str]]:
        for i, name in enumerate(self.include):
            if name not in INCLUDABLE:
                expected = " or ".join(INCLUDABLE)
                raise invalid(f"include[{i}]", f"found {name[:80]!r}, expected {expected}")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", f"this field requires {LOGPROBS} in include")
        if len(self.metadata) > MAX_PAIRS:
            pairs = len(self.metadata)
            raise invalid("metadata", f"found {pairs} pairs, expected at most {MAX_PAIRS}")
        for key, value in self.metadata.items():
            if len(key) > MAX_KEY or len(value) > MAX_VALUE:
                most = f"a key of at most {MAX_KEY} characters and a value of at most {MAX_VALUE}"
                raise invalid(f"metadata.{key[:MAX_KEY]}", f"expected {most}")
        return super().chat(top_logprobs=self.top_logprobs if self.logprobs else None)


def next_turn(server: Server, body: InputTokens) -> NextTurn:
    return NextTurn(server, *body.chat(), "input", shorten=body.truncation == "auto")


class ResponsesReply(Dialect):
    body: ResponsesBody
    request: NextTurn

    def __init__(self, body: ResponsesBody, request: NextTurn) -> None:
        super().__init__(body, request)
        self._items: list[Item] = []  # items that have begun
        self._pending: list[Token] = []  # tokens whose text is still withheld

    async def full_answer(self, reply: Reply) -> dict[str, Any]:
        async for event in self._events(reply):
            last = event
        return last["response"]

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        sequence = count()
        async for event in self._events(reply):
            yield sse_event({"sequence_number": next(sequence)} | event, event["type"])

    async def _events(self, reply: Reply) -> AsyncIterator[Item]:
        # text is streamed in pieces, and each call in one piece
        begun = self._response(reply, "in_progress", [])
        yield _event("response.created", response=begun)
        yield _event("response.in_progress", response=begun)
        message, items = GeneratedMessage(), self._items
        async for delta in self.request.deltas(reply):
            message.add(delta)
            if delta.token is not None and delta.field == CONTENT:
                self._pending.append(delta.token)
            for field, text in delta.texts.items():
                for event in self._text_events(reply, ITEM_BY_FIELD[field], text):
                    yield event
        if not items and not message.calls:  # an empty answer
            for event in self._begin_text("message"):
                yield event
        if items:
            for event in self._end_text(reply):
                yield event
        for call in message.calls:
            for event in self._call_events(call):
                yield event
        ended = self._ended(reply, message, items)
        yield _event(f"response.{ended['status']}", response=ended)

    def _text_events(self, reply: Reply, kind: str, text: str) -> Iterator[Item]:
        if not self._items or self._items[-1]["type"] != kind:
            if self._items:
                yield from self._end_text(reply)
            yield from self._begin_text(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        more = {"logprobs": self._add_logprobs(reply, part)} if "logprobs" in part else {}
        yield _event(f"response.{EVENT_BY_ITEM[kind]}.delta", **self._place, delta=text, **more)

    def _begin_text(self, kind: str) -> Iterator[Item]:
        item = _text_item(kind)
        yield self._begin(item, content=[])
        yield _event("response.content_part.added", **self._place, part=item["content"][0])

    def _end_text(self, reply: Reply) -> Iterator[Item]:
        item = self._items[-1]
        place, part, more = self._place, item["content"][0], dict[str, Any]()
        if "logprobs" in part:
            self._add_logprobs(reply, part)
            more["logprobs"] = part["logprobs"]
        kind = EVENT_BY_ITEM[item["type"]]
        yield _event(f"response.{kind}.done", **place, text=part["text"], **more)
        yield _event("response.content_part.done", **place, part=part)
        yield self._end()

    def _add_logprobs(self, reply: Reply, part: Item) -> list[Any]:
        texts, new = reply.resolved.chosen.renderer.texts, list[Any]()
        if self.body.logprobs:
            new = texts.chat_logprobs(self._pending, self.body.top_logprobs)
        part["logprobs"] += new
        self._pending = []
        return new

    def _call_events(self, call: Item) -> Iterator[Item]:
        item = {
            "type": "function_call", "id": new_id("fc"), "call_id": call["id"],
            **call["function"], "status": "completed",
        }  # fmt: skip
        yield self._begin(item, arguments="")
        place = {"output_index": len(self._items) - 1, "item_id": item["id"]}
        kind, arguments = "response.function_call_arguments", item["arguments"]
        yield _event(f"{kind}.delta", **place, delta=arguments)
        yield _event(f"{kind}.done", **place, arguments=arguments, name=item["name"])
        yield self._end()

    def _begin(self, item: Item, **empty: Any) -> Item:
        self._items.append(item)
        at, shown = len(self._items) - 1, item | {"status": "in_progress"} | empty
        return _event("response.output_item.added", output_index=at, item=shown)

    def _end(self) -> Item:
        at, item = len(self._items) - 1, self._items[-1]
        return _event("response.output_item.done", output_index=at, item=item)

    @property
    def _place(self) -> dict[str, Any]:
        at, id = len(self._items) - 1, self._items[-1]["id"]
        return {"item_id": id, "output_index": at, "content_index": 0}

    def _ended(self, reply: Reply, message: GeneratedMessage, items: list[Item]) -> dict[str, Any]:
        cut = message.end.reason == "length"
        response = self._response(reply, "incomplete" if cut else "completed", items)
        usage = reply.usage
        response["usage"] = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def _response(self, reply: Reply, status: str, items: list[Item]) -> dict[str, Any]:
        return {
            "id": reply.id,
            "object": "response",
            "created_at": reply.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": items,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}} | drop_nulls(self.body.text),
            "usage": None,
        } | self.body.model_dump(include=RETURNED_FIELDS)


def _event(kind: str, **fields: Any) -> Item:
    return {"type": kind} | fields


def _text_item(kind: str) -> Item:
    if kind == "reasoning":
        content: list[Item] = [{"type": "reasoning_text", "text": ""}]
        return {"type": kind, "id": new_id("rs"), "summary": [], "content": content}
    content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    return {
        "type": kind, "id": new_id("msg"), "role": "assistant", "status": "completed",
        "content": content,
    }  # fmt: skip


def _messages(items: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Converts items to messages, each with the field of its first item. Reasoning and calls are
    merged into the assistant message next to them.
    """
    names: dict[str, str] = {}
    turn: dict[str, Any] = {}
    begun = ""
    for i, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input[{i}]"
        assistant = kind in ("function_call", "reasoning") or item.get("role") == "assistant"
        if turn and (not assistant or (kind == "message" and "content" in turn)):
            yield begun, turn
            turn = {}
        if assistant and not turn:
            begun, turn = where, {"role": "assistant"}
        if kind == "message":
            text = _text(item.get("content"), f"{where}.content")
            if assistant:
                turn["content"] = text
            else:
                yield where, {"role": item.get("role"), "content": text}
        elif kind == "function_call":
            name, id = item.get("name"), item.get("call_id")
            call = as_call(id, name, item.get("arguments"), where)
            names[call["id"]] = str(name)
            turn.setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            id = str(item.get("call_id"))
            text = _text(item.get("output"), f"{where}.output")
            result = {"tool_call_id": id, "name": names.get(id, ""), "content": text}
            yield where, {"role": "tool"} | result
        elif kind == "reasoning":
            if item.get("encrypted_content"):
                where += ".encrypted_content"
                raise invalid(where, "this field is not supported; remove it")
            turn["reasoning_content"] = _text(item.get("content") or [], f"{where}.content")
        else:
            raise invalid(f"{where}.type", f"found {kind!r}, which is not supported")
    if turn:
        yield begun, turn


def _text(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    return join_text(content, PARTS, where + "[{}]", "found type {}, expected text as a string")
