"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.backend import Ended, Token
from lorafold.serving.job import Reply
from lorafold.serving.next_turn import AllSaid, NextTurn
from lorafold.serving.parts import CONTENT
from lorafold.serving.refusal import naming
from lorafold.serving.server import Dialect, Server
from lorafold.serving.wire.answers import DONE, event, finish, new_id
from lorafold.serving.wire.chat import Chat


def routes(server: Server) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """A model's next message in a conversation."""
        caller = server.caller(request)
        written = await server.body(request, caller, Chat, partial(Answer, server))
        return await server.complete(request, caller, new_id("chatcmpl"), written)

    return router


class Answer(Dialect):
    """A turn as chat completions have it."""

    def __init__(self, server: Server, body: Chat) -> None:
        with naming(body.names):
            self.turn, self.body = NextTurn(server, body), body
        super().__init__(self.turn, body.stream, body.names)

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        messages = await self.turn.all_said(reply)
        choices = [
            await asyncio.to_thread(self._choice, reply, i, said) for i, said in enumerate(messages)
        ]
        found = self._head(reply, "chat.completion") | {"choices": choices, "usage": reply.usage}
        if self.body.return_token_ids:
            found["prompt_token_ids"] = reply.jobs[0].request.prompt
        return found

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        head = self._head(reply, "chat.completion.chunk")
        usage = {"usage": None} if self.body.stream_options.include_usage else {}

        def chunk(i: int, delta: dict[str, Any], **more: Any) -> bytes:
            choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | more
            return event(head | {"choices": [choice]} | usage)

        for i, job in enumerate(reply.jobs):
            ids = {"prompt_token_ids": job.request.prompt} if self.body.return_token_ids else {}
            yield chunk(i, {"role": "assistant", "content": ""}, **ids)
        async for said in self.turn.said(reply):
            i, more = said.index, dict[str, Any]()
            if said.token is not None and self.body.logprobs:
                more["logprobs"] = self._logprobs(reply, [said.token])
            if said.token is not None and self.body.return_token_ids:
                more["token_ids"] = [said.token.token]
            if said.parts or more:
                yield chunk(i, dict(said.parts), **more)
            for k, call in enumerate(said.calls):
                yield chunk(i, {"tool_calls": [{"index": k} | call]})
            if said.end is not None:
                yield chunk(i, {}, finish_reason=_finish(said.end, said.calls))
        if self.body.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": reply.usage})
        yield DONE

    def _choice(self, reply: Reply, i: int, message: AllSaid) -> dict[str, Any]:
        assert message.end is not None
        content = message.texts.get(CONTENT, None if message.calls else "")
        told: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        told |= {field: text for field, text in message.texts.items() if field != CONTENT}
        if message.calls:
            told["tool_calls"] = message.calls
        choice = {
            "index": i,
            "message": told,
            "logprobs": self._logprobs(reply, [token for _, token in message.tokens]),
            "finish_reason": _finish(message.end, message.calls),
        }
        ids = {"token_ids": message.end.tokens} if self.body.return_token_ids else {}
        return choice | ids

    def _logprobs(self, reply: Reply, tokens: list[Token]) -> dict[str, Any] | None:
        top, shown = self.body.top_logprobs or 0, reply.prompted.chosen.renderer.shown
        return shown.chat(tokens, top) if self.body.logprobs else None

    def _head(self, reply: Reply, kind: str) -> dict[str, Any]:
        return {
            "id": reply.id,
            "object": kind,
            "created": reply.created,
            "model": self.body.model,
            "system_fingerprint": reply.prompted.chosen.fingerprint,
        }


def _finish(end: Ended, calls: list[dict[str, Any]]) -> str:
    return "tool_calls" if calls else finish(end)
