"""`POST /v1/responses`, without anything that is kept between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.data.messages import without_nulls
from lorafold.serving.backend import Token
from lorafold.serving.job import Reply
from lorafold.serving.next_turn import AllSaid, NextTurn
from lorafold.serving.parts import CONTENT, REASONING
from lorafold.serving.refusal import naming
from lorafold.serving.server import Dialect, Server, answer
from lorafold.serving.wire.answers import event, new_id
from lorafold.serving.wire.response import Count, Respond

Item = dict[str, Any]
KINDS = {REASONING: "reasoning", CONTENT: "message"}
TEXTS = {"reasoning": "reasoning_text", "message": "output_text"}  # the events of an item's text


def routes(server: Server) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """A model's next message, and its calls, in a conversation given as items."""
        caller = server.caller(request)
        written = await server.body(request, caller, Respond, partial(Answer, server))
        return await server.complete(request, caller, new_id("resp"), written)

    @router.post("/v1/responses/input_tokens")
    async def count(request: Request) -> Response:
        """How many tokens the conversation has."""
        caller = server.caller(request)
        turn, names = await server.body(request, caller, Count, partial(turned, server))
        with naming(names):
            found = await server.admission.count(caller, turn)
        return answer({"object": "response.input_tokens", "input_tokens": found})

    return router


def turned(server: Server, body: Count) -> tuple[NextTurn, dict[str, str]]:
    """The turn that a body asks for, and the names of its fields there."""
    chat, names = body.chat()
    with naming(names):
        return NextTurn(server, chat, "input", shorten=body.truncation == "auto"), names


class Answer(Dialect):
    """A turn as responses have it."""

    def __init__(self, server: Server, body: Respond) -> None:
        self.turn, names = turned(server, body)
        super().__init__(self.turn, body.stream, names)
        self.body, self._number = body, 0
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
        message, spoken = AllSaid(), list[Item]()
        async for said in self.turn.said(reply):
            message.take(said)
            if said.token is not None and said.where == CONTENT:
                self._unsaid.append(said.token)
            for name, text in said.parts:
                kind = KINDS[name]
                if not spoken or spoken[-1]["type"] != kind:
                    for one in self._closed(reply, spoken):
                        yield one
                    spoken.append(_spoken(kind, ""))
                    for one in self._opened(spoken):
                        yield one
                yield self._delta(reply, spoken, text)
        for one in self._closed(reply, spoken):
            yield one
        items = [*spoken, *(_called(call) for call in message.calls)]
        for at, item in enumerate(items[len(spoken) :], len(spoken)):
            for one in self._call(at, item):
                yield one
        if not items:
            items = [_spoken("message", "")]
            for one in (*self._opened(items), *self._closed(reply, items)):
                yield one
        ended = self._ended(reply, message, items)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _opened(self, items: list[Item]) -> Iterator[bytes]:
        """Begin the last item, which is spoken."""
        item, at = items[-1], len(items) - 1
        empty = item | {"status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=at, item=empty)
        where = {"item_id": item["id"], "output_index": at, "content_index": 0}
        yield self._event("response.content_part.added", **where, part=dict(item["content"][0]))

    def _delta(self, reply: Reply, items: list[Item], text: str) -> bytes:
        """Add to the last item."""
        item, at = items[-1], len(items) - 1
        part = item["content"][0]
        part["text"] += text
        where = {"item_id": item["id"], "output_index": at, "content_index": 0}
        more = {"logprobs": self._add_logprobs(reply, part)} if "logprobs" in part else {}
        return self._event(f"response.{TEXTS[item['type']]}.delta", **where, delta=text, **more)

    def _add_logprobs(self, reply: Reply, part: Item) -> list[Any]:
        """Those of the tokens up to here, which are added to a message's text."""
        new = self._logprobs(reply, self._unsaid)
        part["logprobs"] += new
        self._unsaid = []
        return new

    def _logprobs(self, reply: Reply, tokens: list[Token]) -> list[Any]:
        if not self.body.logprobs:
            return []
        found = reply.prompted.chosen.renderer.shown.chat(tokens, self.body.top_logprobs)["content"]
        return list(found)

    def _closed(self, reply: Reply, items: list[Item]) -> Iterator[bytes]:
        """End the last item, if there is one."""
        if not items:
            return
        item, at = items[-1], len(items) - 1
        where = {"item_id": item["id"], "output_index": at, "content_index": 0}
        part, kind, more = item["content"][0], TEXTS[item["type"]], dict[str, Any]()
        if "logprobs" in part:
            self._add_logprobs(reply, part)
            more["logprobs"] = part["logprobs"]
        yield self._event(f"response.{kind}.done", **where, text=part["text"], **more)
        yield self._event("response.content_part.done", **where, part=part)
        yield self._event("response.output_item.done", output_index=at, item=item)

    def _call(self, at: int, item: Item) -> Iterator[bytes]:
        """A whole call."""
        empty = item | {"status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=at, item=empty)
        where = {"output_index": at, "item_id": item["id"]}
        kind, arguments = "response.function_call_arguments", item["arguments"]
        yield self._event(f"{kind}.delta", **where, delta=arguments)
        yield self._event(f"{kind}.done", **where, arguments=arguments, name=item["name"])
        yield self._event("response.output_item.done", output_index=at, item=item)

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
