"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from lorafold.serving.backend import Token
from lorafold.serving.body import finish
from lorafold.serving.job import CONTENT, Reply
from lorafold.serving.next_turn import AllSaid, Chat, NextTurn
from lorafold.serving.refusal import naming
from lorafold.serving.routes.completions import Choices
from lorafold.serving.server import Server


def routes(app: FastAPI, server: Server) -> None:
    """Add it."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """A model's next message in a conversation."""
        return await server.complete(request, Chat, partial(Answer, server), "chatcmpl")


class Answer(Choices):
    """A turn as chat completions have it."""

    body: Chat
    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, server: Server, body: Chat) -> None:
        with naming(body.names):
            self.turn = NextTurn(server, body)
        super().__init__(body, self.turn, body.names)

    async def whole(self, reply: Reply) -> dict[str, Any]:
        found = await super().whole(reply)
        if self.body.return_token_ids:
            found["prompt_token_ids"] = reply.jobs[0].request.prompt
        return found

    async def choices(self, reply: Reply) -> list[dict[str, Any]]:
        messages = await self.turn.all_said(reply)
        return [
            await asyncio.to_thread(self._choice, reply, i, said) for i, said in enumerate(messages)
        ]

    async def chunks(self, reply: Reply) -> AsyncIterator[dict[str, Any]]:
        def chunk(i: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | more

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
                yield chunk(i, {}, finish_reason="tool_calls" if said.calls else finish(said.end))

    def _choice(self, reply: Reply, i: int, message: AllSaid) -> dict[str, Any]:
        assert message.end is not None
        content = message.texts.pop(CONTENT, None if message.calls else "")
        told: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        calls = {"tool_calls": message.calls} if message.calls else {}
        choice = {
            "index": i,
            "message": told | message.texts | calls,
            "logprobs": self._logprobs(reply, [token for _, token in message.tokens]),
            "finish_reason": "tool_calls" if message.calls else finish(message.end),
        }
        return choice | ({"token_ids": message.end.tokens} if self.body.return_token_ids else {})

    def _logprobs(self, reply: Reply, tokens: list[Token]) -> dict[str, Any] | None:
        top, shown = self.body.top_logprobs or 0, reply.prompted.chosen.renderer.shown
        return {"content": shown.chat(tokens, top)} if self.body.logprobs else None
