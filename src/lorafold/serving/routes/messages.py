"""`POST /v1/messages`: the turn as Anthropic's clients have it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.backend import Ended
from lorafold.serving.job import Reply
from lorafold.serving.next_turn import AllSaid, NextTurn
from lorafold.serving.parts import REASONING
from lorafold.serving.refusal import naming
from lorafold.serving.server import Dialect, Server, answer
from lorafold.serving.wire.answers import event, new_id
from lorafold.serving.wire.messages import PATH, Ask, Count

Block = dict[str, Any]
STOPS = {"end": "end_turn", "length": "max_tokens", "stop": "stop_sequence"}
# of each kind of block: the type of what is added to it, and the field that grows
DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


def routes(server: Server) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.post(PATH)
    async def messages(request: Request) -> Response:
        """A model's next message in a conversation, in Anthropic's dialect."""
        caller = server.caller(request)
        written = await server.body(request, caller, Ask, partial(Answer, server))
        return await server.complete(request, caller, new_id("msg"), written)

    @router.post(f"{PATH}/count_tokens")
    async def count(request: Request) -> Response:
        """How many tokens the conversation has."""
        caller = server.caller(request)
        turn, names = await server.body(request, caller, Count, partial(turned, server))
        with naming(names):
            return answer({"input_tokens": await server.admission.count(caller, turn)})

    return router


def turned(server: Server, body: Count) -> tuple[NextTurn, dict[str, str]]:
    """The turn that a body asks for, and the names of its fields there."""
    chat, names = body.chat()
    with naming(names):
        return NextTurn(server, chat, wishes=body.wishes), names


class Answer(Dialect):
    """A turn as messages have it."""

    def __init__(self, server: Server, body: Ask) -> None:
        self.turn, names = turned(server, body)
        self.body = body
        super().__init__(self.turn, body.stream, names)

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        [message] = await self.turn.all_said(reply)
        content = [_spoken(name, text) for name, text in message.texts.items()]
        content += [_called(call) for call in message.calls]
        return self._message(reply, content) | self._end(reply, message)

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes: text in pieces, each call whole once it is there."""
        tokens = len(reply.jobs[0].request.prompt)
        begun = self._message(reply, []) | {"usage": _usage(tokens, 0, 0)}
        yield _event("message_start", message=begun)
        message, at, open = AllSaid(), -1, ""
        async for said in self.turn.said(reply):
            message.take(said)
            for name, text in said.parts:
                if name != open:
                    if open:
                        yield _event("content_block_stop", index=at)
                    at, open = at + 1, name
                    block = _spoken(name, "")
                    yield _event("content_block_start", index=at, content_block=block)
                yield _delta(at, _spoken(name, "")["type"], text)
        if open:
            yield _event("content_block_stop", index=at)
        for call in message.calls:
            at += 1
            for one in _call_events(at, call):
                yield one
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

    def _end(self, reply: Reply, message: AllSaid) -> dict[str, Any]:
        assert message.end is not None
        end, prompt = message.end, len(reply.jobs[0].request.prompt)
        return {
            "stop_reason": "tool_use" if message.calls else STOPS[end.reason],
            "stop_sequence": self._stopped(reply, end),
            "usage": _usage(prompt - end.cached, end.cached, len(end.tokens)),
        }

    def _stopped(self, reply: Reply, end: Ended) -> str | None:
        """The stop text that ended the completion: the one that follows its text."""
        if end.reason != "stop":
            return None
        after = reply.prompted.chosen.renderer.text(end.tokens)[len(end.text) :]
        return next((stop for stop in self.body.stop_sequences if after.startswith(stop)), None)


def _spoken(name: str, text: str) -> Block:
    """A block of what is said under a field of the message."""
    if name == REASONING:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _called(call: Block) -> Block:
    """A block of a call."""
    function = call["function"]
    given = json.loads(function["arguments"])
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": given}


def _call_events(at: int, call: Block) -> Iterator[bytes]:
    yield _event("content_block_start", index=at, content_block=_called(call) | {"input": {}})
    yield _delta(at, "tool_use", call["function"]["arguments"])
    yield _event("content_block_stop", index=at)


def _delta(at: int, kind: str, text: str) -> bytes:
    name, field = DELTAS[kind]
    return _event("content_block_delta", index=at, delta={"type": name, field: text})


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind} | fields, kind)


def _usage(prompt: int, cached: int, completion: int) -> dict[str, int]:
    return {
        "input_tokens": prompt, "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0, "output_tokens": completion,
    }  # fmt: skip
