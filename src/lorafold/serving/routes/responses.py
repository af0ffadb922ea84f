"""`POST /v1/responses`, without anything that is kept between two of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.desk import Asked
from lorafold.serving.job import Reply
from lorafold.serving.server import Server
from lorafold.serving.speech import CONTENT, REASONING
from lorafold.serving.turn import Message, Turn
from lorafold.serving.wire.answers import event, new_id
from lorafold.serving.wire.response import Respond

Item = dict[str, Any]


def routes(server: Server) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """A model's next message, and its calls, in a conversation given as items."""
        caller = server.caller(request)
        body = await server.body(request, Respond)
        return await server.complete(request, caller, new_id("resp"), Answer(server, body))

    return router


class Answer:
    """A turn as responses have it.

    Args:
        server: the server.
        body: the request.
    """

    def __init__(self, server: Server, body: Respond) -> None:
        self.body, self.turn, self._number = body, Turn(server, body.chat()), 0

    @property
    def streamed(self) -> bool:
        """Whether the client wants events."""
        return self.body.stream

    @property
    def prompt(self) -> str:
        """The rendered conversation."""
        return self.turn.prompt

    def asked(self) -> Asked:
        """What is asked of the engine."""
        return self.turn.asked()

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        message = Message()
        async for said in self.turn.said(reply):
            message.take(said)
        return self._ended(reply, message, self._items(message))

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes: the text in pieces, each call whole once it is there."""
        begun = self._response(reply, "in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        message, items, at = Message(), list[Item](), new_id("msg")
        async for said in self.turn.said(reply):
            message.take(said)
            for name, text in said.parts:
                if name != CONTENT:
                    continue
                if not items:
                    items.append(_message(at, ""))
                    for one in self._opened(items[0]):
                        yield one
                where = {"item_id": at, "output_index": 0, "content_index": 0}
                delta = {"delta": text, "logprobs": []}
                yield self._event("response.output_text.delta", **where, **delta)
        if items:
            items[0] = _message(at, message.texts[CONTENT])
            for one in self._closed(items[0]):
                yield one
        others = [item for item in self._items(message) if item["type"] != "message"]
        for item in others:
            where = {"output_index": len(items)}
            items.append(item)
            called = item["type"] == "function_call"
            empty = {"status": "in_progress", "arguments": ""} if called else {}
            yield self._event("response.output_item.added", **where, item=item | empty)
            if called:
                where |= {"item_id": item["id"]}
                arguments = item["arguments"]
                yield self._event(
                    "response.function_call_arguments.delta", **where, delta=arguments
                )
                yield self._event(
                    "response.function_call_arguments.done", **where, arguments=arguments,
                    name=item["name"],
                )  # fmt: skip
            done = {"output_index": where["output_index"], "item": item}
            yield self._event("response.output_item.done", **done)
        ended = self._ended(reply, message, items)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _opened(self, item: Item) -> Iterator[bytes]:
        empty = item | {"status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=empty)
        where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **where, part=item["content"][0])

    def _closed(self, item: Item) -> Iterator[bytes]:
        where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        part = item["content"][0]
        text = {"text": part["text"], "logprobs": []}
        yield self._event("response.output_text.done", **where, **text)
        yield self._event("response.content_part.done", **where, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1} | fields, kind)

    def _items(self, message: Message) -> list[Item]:
        items: list[Item] = []
        if thought := message.texts.get(REASONING):
            content = [{"type": "reasoning_text", "text": thought}]
            items.append(
                {"type": "reasoning", "id": new_id("rs"), "summary": [], "content": content}
            )
        if (text := message.texts.get(CONTENT)) or not message.calls:
            items.append(_message(new_id("msg"), text or ""))
        for call in message.calls:
            items.append(
                {
                    "type": "function_call",
                    "id": new_id("fc"),
                    "call_id": call["id"],
                    "name": call["function"]["name"],
                    "arguments": call["function"]["arguments"],
                    "status": "completed",
                }
            )
        return items

    def _ended(self, reply: Reply, message: Message, items: list[Item]) -> dict[str, Any]:
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
            "metadata": {},
            "model": body.model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _message(id: str, text: str) -> Item:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "type": "message", "id": id, "role": "assistant", "status": "completed", "content": [part],
    }  # fmt: skip
