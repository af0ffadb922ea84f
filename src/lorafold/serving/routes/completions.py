"""`POST /v1/chat/completions` and `POST /v1/completions`, whose answers are lists of choices; and
`POST /tokenize` and `POST /detokenize`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, cast

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.serving.backend import Token
from lorafold.serving.chat import AllSaid, ChatBody, NextTurn
from lorafold.serving.completion_job import CONTENT, DialectRequest, Prompted, Prompts, Reply
from lorafold.serving.errors import Refusal, check_number, naming, wrong
from lorafold.serving.keys import Caller
from lorafold.serving.rendering import Renderer, ServedModel
from lorafold.serving.request_body import DONE, Body, Completing, Listed, as_json, event, finish
from lorafold.serving.server import Dialect, Server, answer, unless_left

Ids = Listed[int]


def routes(app: FastAPI, server: Server) -> None:
    """Add them."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """A model's next message in a conversation."""
        return await server.complete(request, ChatBody, partial(ChatAnswer, server), "chatcmpl")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """What follows a prompt, given as text or as tokens, or several."""
        return await server.complete(
            request, CompletionsBody, partial(CompletionsReply, server), "cmpl"
        )


def tokens(app: FastAPI, server: Server) -> None:
    """Add the routes of tokens."""

    def admitted(request: Request) -> Caller:
        caller = server.caller(request)
        server.admission.check_caller(caller, 1)
        return caller

    def renderer_of(caller: Caller, model: str | None) -> Renderer:
        if model is None and not caller.base:
            told = "model: expected a value, since the key may not use the base"
            raise Refusal(400, "missing_parameter", told, "model")
        return server.registry.choose(caller, model or server.registry.base).renderer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of a conversation as the prompt for its next turn."""
        caller = admitted(request)
        body = await server.body(request, caller, Tokenize, lambda body: body)
        if (body.prompt is None) == (body.messages is None):
            raise wrong("prompt", "expected either prompt or messages")

        def tokens() -> bytes:
            renderer = renderer_of(caller, body.model)
            if body.prompt is not None:
                found = renderer.tokens(body.prompt, body.add_special_tokens)
            else:
                chat = ChatBody(model="", messages=body.messages or [], tools=body.tools)
                limits = server.settings.limits
                text = renderer.chat(chat.conversation(limits), chat.offered(limits), {})
                found = renderer.prompt_tokens(text)
            server.spent.add(caller.tenant, len(found))
            told: dict[str, Any] = {
                "count": len(found), "max_model_len": server.host.backend.length, "tokens": found,
            }  # fmt: skip
            if body.return_token_strs:
                told["token_strs"] = [renderer.shown.text(token) for token in found]
            return as_json(told)

        content = await unless_left(request, server.host.think(tokens, caller.tenant))
        return Response(content, media_type="application/json")

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        caller = admitted(request)
        body = await server.body(request, caller, Detokenize, lambda body: body)
        server.spent.add(caller.tenant, len(body.tokens))

        def text() -> str:
            return renderer_of(caller, body.model).text(body.tokens)

        found = await unless_left(request, server.host.think(text, caller.tenant))
        return answer({"prompt": found})


class CompletionsBody(Completing):
    """The body of `POST /v1/completions`."""

    prompt: str | Ids | Listed[str] | Listed[Ids]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True


class Tokenize(Body):
    """The body of `POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Listed[dict[str, object]] | None = None
    tools: Listed[dict[str, object]] = Field(default_factory=list)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(Body):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[Ids, Field(max_length=1 << 16)]  # a text that one call makes at once


class PlainPrompts(DialectRequest):
    """Plain prompts."""

    body: CompletionsBody

    def __init__(self, server: Server, body: CompletionsBody) -> None:
        super().__init__(body, "prompt", body.max_tokens)
        server.admission.check(body)
        given = body.prompt
        one = isinstance(given, str) or not given or isinstance(given[0], int)
        self.given = cast(list[str | Ids], [given] if one else given)  # each a text or tokens
        check_number("prompt", len(self.given), server.settings.limits.choices)
        self._sampling = body.sampling(logprobs=body.logprobs)

    def rendered(self, renderer: Renderer) -> tuple[object, Prompts]:
        special = self.body.add_special_tokens
        return self.body.prompt, tuple(
            renderer.tokens(one, special) if isinstance(one, str) else tuple(one)
            for one in self.given
        )

    def prompted(self, chosen: ServedModel) -> Prompted:
        scores = self.body.logprobs if self.body.echo else None
        text, prompts = self.rendered(chosen.renderer)
        return Prompted(chosen, text, prompts, self._sampling, prompt_logprobs=scores)


class Choices(Dialect):
    """Abstract: an answer that is a list of choices, whole or each in chunks."""

    body: Completing
    whole_kind = chunk_kind = "text_completion"

    @abstractmethod
    async def choices(self, reply: Reply) -> list[dict[str, Any]]:
        """All choices."""

    @abstractmethod
    def chunks(self, reply: Reply) -> AsyncIterator[dict[str, Any]]:
        """What is new of a choice, as it comes."""

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        choices = await self.choices(reply)
        return self._head(reply, self.whole_kind) | {"choices": choices, "usage": reply.usage}

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        head, counted = self._head(reply, self.chunk_kind), self.body.stream_options.include_usage
        usage = {"usage": None} if counted else {}
        async for choice in self.chunks(reply):
            yield event(head | {"choices": [choice]} | usage)
        if counted:
            yield event(head | {"choices": [], "usage": reply.usage})
        yield DONE

    def _head(self, reply: Reply, kind: str) -> dict[str, Any]:
        chosen = reply.prompted.chosen
        return {
            "id": reply.id,
            "object": kind,
            "created": reply.created,
            "model": self.body.model,
            # what computes the answer
            "system_fingerprint": f"{chosen.key or chosen.name}+{chosen.base[:12]}",
        }


class CompletionsReply(Choices):
    """Completions of plain prompts, as OpenAI's older clients have them."""

    body: CompletionsBody

    def __init__(self, server: Server, body: CompletionsBody) -> None:
        self.prompts = PlainPrompts(server, body)
        super().__init__(body, self.prompts)

    async def choices(self, reply: Reply) -> list[dict[str, Any]]:
        tokens: list[list[Token]] = [[] for _ in reply.jobs]
        async for i, one in reply.events():
            if isinstance(one, Token):
                tokens[i].append(one)
        choices = []
        for i, job in enumerate(reply.jobs):
            assert job.end is not None
            echo, logprobs = await asyncio.to_thread(self._told, reply, i, tokens[i])
            choice = _choice(i, echo + job.end.text, logprobs, finish(job.end))
            if self.body.return_token_ids:
                choice["token_ids"] = job.end.tokens
                choice["prompt_token_ids"] = job.request.prompt
            choices.append(choice)
        return choices

    async def chunks(self, reply: Reply) -> AsyncIterator[dict[str, Any]]:
        lengths = [0] * len(reply.jobs)
        echoed: dict[int, int] = {}  # how long the text of each prompt is that was sent
        async for i, one in reply.events():
            if self.body.echo and i not in echoed:
                echo, logprobs = await asyncio.to_thread(self._told, reply, i, [])
                echoed[i] = len(echo)
                yield _choice(i, echo, logprobs)
            if isinstance(one, Token):
                scores = self._logprobs(reply, [one], echoed.get(i, 0) + lengths[i])
                ids = {"token_ids": [one.token]} if self.body.return_token_ids else {}
                lengths[i] += len(one.text)
                yield _choice(i, one.text, scores) | ids
            else:
                yield _choice(i, one.text[lengths[i] :], None, finish(one))

    def _told(self, reply: Reply, i: int, tokens: list[Token]) -> tuple[str, dict[str, Any] | None]:
        """The text of a completion's prompt, if it is wanted, and the log probabilities of its
        tokens and of those of the completion. It takes its time.
        """
        echo = self._echo(reply, i) if self.body.echo else []
        return "".join(token.text for token in echo), self._logprobs(reply, echo + tokens, 0)

    def _echo(self, reply: Reply, i: int) -> list[Token]:
        """The prompt of a completion as tokens, with their texts."""
        job, given = reply.jobs[i], self.prompts.given[i // self.body.n]
        ids = job.request.prompt
        shown = job.prompt or [Token(job.request.id, token) for token in ids]
        text = given if isinstance(given, str) else None
        pieces = reply.prompted.chosen.renderer.shown.pieces(ids, text)
        return [replace(t, text=piece) for t, piece in zip(shown, pieces, strict=True)]

    def _logprobs(self, reply: Reply, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        top, shown = self.body.logprobs, reply.prompted.chosen.renderer.shown
        return None if top is None else shown.legacy(tokens, top, offset)


def _choice(i: int, text: str, logprobs: object, finish: str | None = None) -> dict[str, Any]:
    return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatAnswer(Choices):
    """A turn as chat completions have it."""

    body: ChatBody
    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, server: Server, body: ChatBody) -> None:
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
