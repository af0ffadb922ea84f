"""`POST /v1/responses`, without anything that is kept between two of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.job import Reply
from lorafold.serving.server import Server
from lorafold.serving.speech import CONTENT, REASONING
from lorafold.serving.turn import Message, Turn, Written
from lorafold.serving.wire.answers import event, new_id
from lorafold.serving.wire.response import Respond

Item = dict[str, Any]
KINDS = {REASONING: "reasoning", CONTENT: "message"}
# the events of an item's text, and what they have besides
TEXTS: dict[str, tuple[str, Item]] = {
    "reasoning": ("reasoning_text", {}),
    "message": ("output_text", {"logprobs": []}),
}


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


class Answer(Written):
    """A turn as responses have it.

    Args:
        server: the server.
        body: the request.
    """

    def __init__(self, server: Server, body: Respond) -> None:
        super().__init__(Turn(server, body.chat()), body.stream)
        self.body, self._number = body, 0

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        message = Message()
        async for said in self.turn.said(reply):
            message.take(said)
        return self._ended(reply, message, self._items(message))

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes: text in pieces, each call whole once it is there."""
        begun = self._response(reply, "in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        message, spoken = Message(), list[Item]()
        async for said in self.turn.said(reply):
            message.take(said)
            for name, text in said.parts:
                kind = KINDS[name]
                if not spoken or spoken[-1]["type"] != kind:
                    for one in self._closed(spoken):
                        yield one
                    spoken.append(_spoken(kind, ""))
                    for one in self._opened(spoken):
                        yield one
                yield self._delta(spoken, text)
        for one in self._closed(spoken):
            yield one
        items = [*spoken, *(_called(call) for call in message.calls)]
        for at, item in enumerate(items[len(spoken) :], len(spoken)):
            for one in self._call(at, item):
                yield one
        if not items:
            items = [_spoken("message", "")]
            for one in (*self._opened(items), *self._closed(items)):
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

    def _delta(self, items: list[Item], text: str) -> bytes:
        """Add to the last item."""
        item, at = items[-1], len(items) - 1
        item["content"][0]["text"] += text
        where = {"item_id": item["id"], "output_index": at, "content_index": 0}
        kind, more = TEXTS[item["type"]]
        return self._event(f"response.{kind}.delta", **where, delta=text, **more)

    def _closed(self, items: list[Item]) -> Iterator[bytes]:
        """End the last item, if there is one."""
        if not items:
            return
        item, at = items[-1], len(items) - 1
        where = {"item_id": item["id"], "output_index": at, "content_index": 0}
        part, (kind, more) = item["content"][0], TEXTS[item["type"]]
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

    def _items(self, message: Message) -> list[Item]:
        spoken = [_spoken(KINDS[name], text) for name, text in message.texts.items()]
        return [*spoken, *map(_called, message.calls)] or [_spoken("message", "")]

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
