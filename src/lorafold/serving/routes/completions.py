"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from lorafold.serving.backend import Token
from lorafold.serving.job import Asked, Prompted, Prompts, Reply
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
        written = await server.body(request, caller, Completion, partial(Answer, server))
        return await server.complete(request, caller, new_id("cmpl"), written)

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
        scores = self.body.logprobs if self.body.echo else None
        text, prompts = self.rendered(chosen.renderer)
        return Prompted(chosen, text, prompts, self._sampling, prompt_logprobs=scores)


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
            echo, logprobs = await asyncio.to_thread(self._told, reply, i, tokens[i])
            choice: dict[str, Any] = {
                "index": i,
                "text": echo + job.end.text,
                "logprobs": logprobs,
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
        echoed: dict[int, int] = {}  # how long the text of each prompt is that was sent
        async for i, one in reply.events():
            if self.body.echo and i not in echoed:
                echo, logprobs = await asyncio.to_thread(self._told, reply, i, [])
                echoed[i] = len(echo)
                choice: dict[str, Any] = {
                    "index": i, "text": echo, "logprobs": logprobs, "finish_reason": None,
                }  # fmt: skip
                yield event(head | {"choices": [choice]} | usage)
            text = one.text if isinstance(one, Token) else one.text[lengths[i] :]
            choice = {
                "index": i, "text": text, "logprobs": None, "finish_reason": None,
            }  # fmt: skip
            if isinstance(one, Token):
                choice["logprobs"] = self._logprobs(reply, [one], echoed.get(i, 0) + lengths[i])
                lengths[i] += len(text)
                if self.body.return_token_ids:
                    choice["token_ids"] = [one.token]
            else:
                choice["finish_reason"] = finish(one)
            yield event(head | {"choices": [choice]} | usage)
        if self.body.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": reply.usage})
        yield DONE

    def _told(
        self, reply: Reply, i: int, tokens: list[Token]
    ) -> tuple[str, dict[str, Any] | None]:
        """The text of a completion's prompt, if it is wanted, and the log probabilities of its
        tokens and of those of the completion. It takes its time.
        """
        echo = self._echo(reply, i)
        return "".join(token.text for token in echo), self._logprobs(reply, echo + tokens, 0)

    def _echo(self, reply: Reply, i: int) -> list[Token]:
        """The prompt of a completion as tokens, with their texts, if it is wanted."""
        if not self.body.echo:
            return []
        job, each = reply.jobs[i], len(reply.jobs) // len(reply.prompted.prompts)
        given = self.body.prompts(len(reply.jobs))[i // each]
        ids = job.request.prompt
        shown = job.prompt or [Token(job.request.id, token) for token in ids]
        text = given if isinstance(given, str) else None
        pieces = reply.prompted.chosen.renderer.shown.pieces(ids, text)
        return [replace(t, text=piece) for t, piece in zip(shown, pieces, strict=True)]

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
