"""`POST /v1/responses`: what is asked for, as the conversation that it is, and the turn as items.

Nothing is kept between requests, so that fields that name an earlier response are not supported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.data.messages import without_nulls
from lorafold.serving.backend import Token
from lorafold.serving.chat import AllSaid, ChatBody, NextTurn, call_of, chat_of, text_of
from lorafold.serving.completion_job import CONTENT, REASONING, Reply
from lorafold.serving.errors import naming, wrong
from lorafold.serving.request_body import Body, Listed, StreamOptions, event, new_id
from lorafold.serving.server import Dialect, Server, answer

Item = dict[str, Any]
PARTS = ("input_text", "output_text", "text", "reasoning_text")
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")  # of the second there is none
PAIRS, KEY, VALUE = 16, 64, 512  # OpenAI's limits of metadata
NAMES = {
    "messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format",
    "reasoning_effort": "reasoning.effort", "verbosity": "text.verbosity",
}  # fmt: skip
ABOUT = ("temperature", "top_p", "stream", "logprobs")  # of a chat, too
KINDS = {REASONING: "reasoning", CONTENT: "message"}
TEXTS = {"reasoning": "reasoning_text", "message": "output_text"}  # the events of an item's text


def routes(app: FastAPI, server: Server) -> None:
    """Add them."""

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """A model's next message, and its calls, in a conversation given as items."""
        return await server.complete(request, Respond, partial(ResponsesReply, server), "resp")

    @app.post("/v1/responses/input_tokens")
    async def count(request: Request) -> Response:
        """How many tokens the conversation has."""
        found = await server.count(request, InputTokens, partial(turned, server))
        return answer({"object": "response.input_tokens", "input_tokens": found})


class InputTokens(Body):
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

    def chat(self) -> tuple[ChatBody, dict[str, str]]:
        """The same as a chat completion, and the names of its fields here."""
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
        return chat_of(
            given,
            tools,
            NAMES,
            model=self.model,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.text.get("format") or {"type": "text"},
            reasoning_effort=self.reasoning.get("effort"),
            verbosity=self.text.get("verbosity"),
            **self._about_the_answer(),
        )

    def _about_the_answer(self) -> dict[str, Any]:
        return {}


class Respond(InputTokens):
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
        top = self.top_logprobs if self.logprobs else None
        about = {"max_tokens": self.max_output_tokens, "top_logprobs": top}
        return about | {name: getattr(self, name) for name in ABOUT}


def turned(server: Server, body: InputTokens) -> tuple[NextTurn, dict[str, str]]:
    """The turn that a body asks for, and the names of its fields there."""
    chat, names = body.chat()
    with naming(names):
        return NextTurn(server, chat, "input", shorten=body.truncation == "auto"), names


class ResponsesReply(Dialect):
    """A turn as responses have it."""

    body: Respond

    def __init__(self, server: Server, body: Respond) -> None:
        self.turn, names = turned(server, body)
        super().__init__(body, self.turn, names)
        self._number = 0
        self._unsaid: list[Token] = []  # of a message, whose text is not yet there

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        [message] = await self.turn.all_said(reply)
        items = await asyncio.to_thread(self._items, reply, message)
        return self._ended(reply, message, items)

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes: text in pieces, each call whole once it is there."""
        begun = self._response(reply, "in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        message, items = AllSaid(), list[Item]()
        async for said in self.turn.said(reply):
            message.take(said)
            if said.token is not None and said.where == CONTENT:
                self._unsaid.append(said.token)
            for name, text in said.parts:
                if not items or items[-1]["type"] != KINDS[name]:
                    for one in (*self._closed(reply, items), *self._opened(items, KINDS[name])):
                        yield one
                yield self._delta(reply, items, text)
        for one in self._closed(reply, items):
            yield one
        for call in message.calls:
            items.append(_called(call))
            for one in self._call(items):
                yield one
        if not items:
            for one in (*self._opened(items, "message"), *self._closed(reply, items)):
                yield one
        ended = self._ended(reply, message, items)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _opened(self, items: list[Item], kind: str) -> Iterator[bytes]:
        """Begin another item, which is spoken."""
        items.append(item := _spoken(kind, ""))
        yield self._added(items, content=[])
        part = dict(item["content"][0])
        yield self._event("response.content_part.added", **_where(items), part=part)

    def _delta(self, reply: Reply, items: list[Item], text: str) -> bytes:
        """Add to the last item."""
        item = items[-1]
        part = item["content"][0]
        part["text"] += text
        more = {"logprobs": self._add_logprobs(reply, part)} if "logprobs" in part else {}
        kind = f"response.{TEXTS[item['type']]}.delta"
        return self._event(kind, **_where(items), delta=text, **more)

    def _add_logprobs(self, reply: Reply, part: Item) -> list[Any]:
        """Those of the tokens up to here, which are added to a message's text."""
        new = self._logprobs(reply, self._unsaid)
        part["logprobs"] += new
        self._unsaid = []
        return new

    def _logprobs(self, reply: Reply, tokens: list[Token]) -> list[Any]:
        shown = reply.prompted.chosen.renderer.shown
        return shown.chat(tokens, self.body.top_logprobs) if self.body.logprobs else []

    def _closed(self, reply: Reply, items: list[Item]) -> Iterator[bytes]:
        """End the last item, if there is one."""
        if not items:
            return
        where, part, more = _where(items), items[-1]["content"][0], dict[str, Any]()
        if "logprobs" in part:
            self._add_logprobs(reply, part)
            more["logprobs"] = part["logprobs"]
        kind = f"response.{TEXTS[items[-1]['type']]}.done"
        yield self._event(kind, **where, text=part["text"], **more)
        yield self._event("response.content_part.done", **where, part=part)
        yield self._done(items)

    def _call(self, items: list[Item]) -> Iterator[bytes]:
        """The last item, which is a call."""
        yield self._added(items, arguments="")
        item = items[-1]
        where = {"output_index": len(items) - 1, "item_id": item["id"]}
        kind, arguments = "response.function_call_arguments", item["arguments"]
        yield self._event(f"{kind}.delta", **where, delta=arguments)
        yield self._event(f"{kind}.done", **where, arguments=arguments, name=item["name"])
        yield self._done(items)

    def _added(self, items: list[Item], **empty: Any) -> bytes:
        item = items[-1] | {"status": "in_progress"} | empty
        return self._event("response.output_item.added", output_index=len(items) - 1, item=item)

    def _done(self, items: list[Item]) -> bytes:
        at = len(items) - 1
        return self._event("response.output_item.done", output_index=at, item=items[-1])

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1} | fields, kind)

    def _items(self, reply: Reply, message: AllSaid) -> list[Item]:
        spoken = [_spoken(KINDS[name], text) for name, text in message.texts.items()]
        for item in spoken:
            if item["type"] == "message":
                said = [token for field, token in message.tokens if field == CONTENT]
                item["content"][0]["logprobs"] = self._logprobs(reply, said)
        return [*spoken, *map(_called, message.calls)] or [_spoken("message", "")]

    def _ended(self, reply: Reply, message: AllSaid, items: list[Item]) -> dict[str, Any]:
        assert message.end is not None
        cut = message.end.reason == "length"
        found = self._response(reply, "incomplete" if cut else "completed", items)
        usage: Any = reply.usage
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        found["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        if cut:
            found["incomplete_details"] = {"reason": "max_output_tokens"}
        return found

    def _response(self, reply: Reply, status: str, items: list[Item]) -> dict[str, Any]:
        body = self.body
        return {
            "id": reply.id,
            "object": "response",
            "created_at": reply.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": body.model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} | without_nulls(body.text),
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": body.truncation,
            "usage": None,
        }


def _where(items: list[Item]) -> dict[str, Any]:
    """Where the text of the last item is."""
    return {"item_id": items[-1]["id"], "output_index": len(items) - 1, "content_index": 0}


def _spoken(kind: str, text: str) -> Item:
    """An item of reasoning, or a message."""
    if kind == "reasoning":
        content: list[Item] = [{"type": "reasoning_text", "text": text}]
        return {"type": kind, "id": new_id("rs"), "summary": [], "content": content}
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {
        "type": kind, "id": new_id("msg"), "role": "assistant", "status": "completed",
        "content": content,
    }  # fmt: skip


def _called(call: Item) -> Item:
    """An item of a call."""
    return {
        "type": "function_call",
        "id": new_id("fc"),
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": "completed",
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
            name, id = item.get("name"), item.get("call_id")
            call = call_of(id, name, item.get("arguments"), f"input[{i}]")
            names[call["id"]] = str(name)
            turn.setdefault("tool_calls", []).append(call)
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
    return text_of(content, PARTS, where + "[{}]", "found a part of type {}, expected text alone")
