"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.backend import Token
from lorafold.serving.job import Reply
from lorafold.serving.prompted import Asked, Prompted, Prompts
from lorafold.serving.rendering import Chosen, Renderer
from lorafold.serving.server import Dialect, Server
from lorafold.serving.wire.answers import DONE, event, finish, new_id
from lorafold.serving.wire.completion import Completion


def routes(server: Server) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """What follows a prompt, given as text or as tokens, or several."""
        caller = server.caller(request)
        body = await server.body(request, Completion)
        return await server.complete(request, caller, new_id("cmpl"), Answer(server, body))

    return router


class PlainPrompts(Asked):
    """Plain prompts."""

    body: Completion

    def __init__(self, server: Server, body: Completion) -> None:
        super().__init__(body, "prompt", body.max_tokens)
        server.admission.check(body)
        self._given = body.prompts(server.settings.limits.choices)
        self._sampling = body.sampling(logprobs=body.logprobs)

    def rendered(self, renderer: Renderer) -> tuple[object, Prompts]:
        special = self.body.add_special_tokens
        return self.body.prompt, tuple(
            renderer.tokens(one, special) if isinstance(one, str) else tuple(one)
            for one in self._given
        )

    def prompted(self, chosen: Chosen) -> Prompted:
        return Prompted(chosen, *self.rendered(chosen.renderer), self._sampling)


class Answer(Dialect):
    """Completions of plain prompts, as OpenAI's older clients have them."""

    def __init__(self, server: Server, body: Completion) -> None:
        super().__init__(PlainPrompts(server, body), body.stream)
        self.body = body

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        tokens: list[list[Token]] = [[] for _ in reply.jobs]
        async for i, one in reply.events():
            if isinstance(one, Token):
                tokens[i].append(one)
        choices = []
        for i, job in enumerate(reply.jobs):
            assert job.end is not None
            choice: dict[str, Any] = {
                "index": i,
                "text": job.end.text,
                "logprobs": self._logprobs(reply, tokens[i], 0),
                "finish_reason": finish(job.end),
            }
            if self.body.return_token_ids:
                choice["token_ids"] = job.end.tokens
                choice["prompt_token_ids"] = job.request.prompt
            choices.append(choice)
        return self._head(reply) | {"choices": choices, "usage": reply.usage}

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        head = self._head(reply)
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        lengths = [0] * len(reply.jobs)
        async for i, one in reply.events():
            text = one.text if isinstance(one, Token) else one.text[lengths[i] :]
            choice: dict[str, Any] = {
                "index": i, "text": text, "logprobs": None, "finish_reason": None,
            }  # fmt: skip
            if isinstance(one, Token):
                choice["logprobs"] = self._logprobs(reply, [one], lengths[i])
                lengths[i] += len(text)
                if self.body.return_token_ids:
                    choice["token_ids"] = [one.token]
            else:
                choice["finish_reason"] = finish(one)
            yield event(head | {"choices": [choice]} | usage)
        if self.body.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": reply.usage})
        yield DONE

    def _logprobs(self, reply: Reply, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        top, shown = self.body.logprobs, reply.prompted.chosen.renderer.shown
        return None if top is None else shown.legacy(tokens, top, offset)

    def _head(self, reply: Reply) -> dict[str, Any]:
        return {
            "id": reply.id,
            "object": "text_completion",
            "created": reply.created,
            "model": self.body.model,
            "system_fingerprint": reply.prompted.chosen.fingerprint,
        }
