"""`POST /v1/chat/completions`, `/v1/completions`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, cast

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.serving.backend import Ended, Token
from lorafold.serving.chat import ChatBody, GeneratedMessage, NextTurn
from lorafold.serving.completion_job import CompletionJob, DialectRequest, Prompts, Reply, Resolved
from lorafold.serving.keys import Caller
from lorafold.serving.refusals import Refusal, check_count, invalid
from lorafold.serving.rendering import Renderer, ServedModel
from lorafold.serving.request_body import DONE, Body, Generation, ListOf, as_json, sse_event
from lorafold.serving.server import Dialect, Server, json_response, until_disconnect

Ids = ListOf[int]


def routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Generates the next message of a conversation."""
        return await server.complete(request, ChatBody, NextTurn, ChatAnswer, "chatcmpl")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continues one or more prompts, given as text or tokens."""
        return await server.complete(
            request, CompletionsBody, PlainPrompts, CompletionsReply, "cmpl"
        )


def tokens(app: FastAPI, server: Server) -> None:
    def admitted(request: Request) -> Caller:
        caller = server.caller(request)
        server.admission.check_caller(caller, 1)
        return caller

    def renderer_of(caller: Caller, model: str | None) -> Renderer:
        if model is None and not caller.base:
            message = "model: this field is required, because your key may not use the base"
            raise Refusal(400, "missing_parameter", message, "model")
        return server.registry.choose(caller, model or server.registry.base).renderer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """Tokenizes a text, or a conversation as the prompt for its next turn."""
        caller = admitted(request)
        body = await server.body(request, caller, Tokenize, lambda body: body)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "expected exactly one of prompt and messages")

        loop = asyncio.get_running_loop()

        def tokens() -> bytes:
            renderer = renderer_of(caller, body.model)
            if body.prompt is not None:
                ids = renderer.tokens(body.prompt, body.add_special_tokens)
            else:
                chat = ChatBody(model="", messages=body.messages or [], tools=body.tools)
                limits = server.settings.limits
                text = renderer.chat(chat.conversation(limits), chat.offered_tools(limits)[0], {})
                ids = renderer.prompt_tokens(text)
            loop.call_soon_threadsafe(server.usage.add, caller.tenant, len(ids))
            content = {
                "count": len(ids), "max_model_len": server.host.backend.length, "tokens": ids,
            }  # fmt: skip
            if body.return_token_strs:
                content["token_strs"] = [renderer.texts.text(token) for token in ids]
            return as_json(content)

        content = await until_disconnect(request, server.host.in_thread(tokens, caller.tenant))
        return Response(content, media_type="application/json")

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """Decodes tokens."""
        caller = admitted(request)
        body = await server.body(request, caller, Detokenize, lambda body: body)
        server.usage.add(caller.tenant, len(body.tokens))

        def text() -> str:
            return renderer_of(caller, body.model).text(body.tokens)

        prompt = await until_disconnect(request, server.host.in_thread(text, caller.tenant))
        return json_response({"prompt": prompt})


class CompletionsBody(Generation):
    """The body of `POST /v1/completions`."""

    prompt: str | Ids | ListOf[str] | ListOf[Ids]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True


class Tokenize(Body):
    """The body of `POST /tokenize`: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: ListOf[dict[str, object]] | None = None
    tools: ListOf[dict[str, object]] = Field(default_factory=list)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(Body):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[Ids, Field(max_length=1 << 16)]  # one call decodes all tokens


class PlainPrompts(DialectRequest):
    body: CompletionsBody

    def __init__(self, server: Server, body: CompletionsBody) -> None:
        super().__init__(body, {}, "prompt", body.max_tokens)
        server.admission.check(body)
        prompt = body.prompt
        single = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
        self.prompts = cast(list[str | Ids], [prompt] if single else prompt)
        check_count("prompt", len(self.prompts), server.settings.limits.choices)
        self._sampling = body.sampling(logprobs=body.logprobs)

    def render_prompts(self, renderer: Renderer) -> tuple[object, Prompts]:
        special = self.body.add_special_tokens
        return self.body.prompt, tuple(
            renderer.tokens(prompt, special) if isinstance(prompt, str) else tuple(prompt)
            for prompt in self.prompts
        )

    def resolve(self, chosen: ServedModel) -> Resolved:
        scores = self.body.logprobs if self.body.echo else None
        text, prompts = self.render_prompts(chosen.renderer)
        return Resolved(chosen, text, prompts, self._sampling, prompt_logprobs=scores)


class Choices(Dialect):
    body: Generation
    whole_kind = chunk_kind = "text_completion"

    @abstractmethod
    async def choices(self, reply: Reply) -> list[dict[str, Any]]:
        """Returns all choices."""

    @abstractmethod
    def chunks(self, reply: Reply) -> AsyncIterator[dict[str, Any]]:
        """Yields parts of choices as they are generated."""

    async def full_answer(self, reply: Reply) -> dict[str, Any]:
        choices = await self.choices(reply)
        head, usage = self._head(reply, self.whole_kind), reply.usage.openai
        return head | {"choices": choices, "usage": usage}

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        head, counted = self._head(reply, self.chunk_kind), self.body.stream_options.include_usage
        usage = {"usage": None} if counted else {}
        async for choice in self.chunks(reply):
            yield sse_event(head | {"choices": [choice]} | usage)
        if counted:
            yield sse_event(head | {"choices": [], "usage": reply.usage.openai})
        yield DONE

    def _head(self, reply: Reply, kind: str) -> dict[str, Any]:
        chosen = reply.resolved.chosen
        return {
            "id": reply.id,
            "object": kind,
            "created": reply.created,
            "model": self.body.model,
            "system_fingerprint": f"{chosen.key or chosen.name}+{chosen.base[:12]}",
        }


class CompletionsReply(Choices):
    body: CompletionsBody
    request: PlainPrompts

    async def choices(self, reply: Reply) -> list[dict[str, Any]]:
        tokens: list[list[Token]] = [[] for _ in reply.jobs]
        async for i, event in reply.events():
            if isinstance(event, Token):
                tokens[i].append(event)
        choices = []
        for i, job in enumerate(reply.jobs):
            assert job.end is not None
            echo, logprobs = await asyncio.to_thread(self._echo, reply, i, tokens[i])
            choice = _choice(i, echo + job.end.text, logprobs, finish_reason(job.end))
            if self.body.return_token_ids:
                choice["token_ids"] = job.end.tokens
                choice["prompt_token_ids"] = job.request.prompt
            choices.append(choice)
        return choices

    async def chunks(self, reply: Reply) -> AsyncIterator[dict[str, Any]]:
        lengths = [0] * len(reply.jobs)
        echoed = {}  # length of each echoed prompt
        async for i, event in reply.events():
            if self.body.echo and i not in echoed:
                echo, logprobs = await asyncio.to_thread(self._echo, reply, i, [])
                echoed[i] = len(echo)
                yield _choice(i, echo, logprobs)
            if isinstance(event, Token):
                scores = self._logprobs(reply, [event], echoed.get(i, 0) + lengths[i])
                ids = {"token_ids": [event.token]} if self.body.return_token_ids else {}
                lengths[i] += len(event.text)
                yield _choice(i, event.text, scores) | ids
            else:
                yield _choice(i, event.text[lengths[i] :], None, finish_reason(event))

    def _echo(self, reply: Reply, i: int, tokens: list[Token]) -> tuple[str, dict[str, Any] | None]:
        """Returns the prompt's text if echo is set, else "", and the logprobs of this text and of
        `tokens`, if requested. Too slow for the event loop.
        """
        echo = list[Token]()
        if self.body.echo:
            request, prompt = reply.jobs[i].request, self.request.prompts[i // self.body.n]
            text = prompt if isinstance(prompt, str) else None
            pieces = reply.resolved.chosen.renderer.texts.pieces(request.prompt, text)
            scored = reply.jobs[i].prompt or [Token(request.id, id) for id in request.prompt]
            echo = [replace(t, text=piece) for t, piece in zip(scored, pieces, strict=True)]
        return "".join(token.text for token in echo), self._logprobs(reply, echo + tokens, 0)

    def _logprobs(self, reply: Reply, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        top, texts = self.body.logprobs, reply.resolved.chosen.renderer.texts
        return None if top is None else texts.legacy_logprobs(tokens, top, offset)


def finish_reason(end: Ended) -> str:
    return "stop" if end.reason == "end" else end.reason


def _choice(i: int, text: str, logprobs: object, reason: str | None = None) -> dict[str, Any]:
    return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}


class ChatAnswer(Choices):
    body: ChatBody
    request: NextTurn
    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    async def full_answer(self, reply: Reply) -> dict[str, Any]:
        return await super().full_answer(reply) | self._prompt_ids(reply.jobs[0])

    def _prompt_ids(self, job: CompletionJob) -> dict[str, Any]:
        return {"prompt_token_ids": job.request.prompt} if self.body.return_token_ids else {}

    async def choices(self, reply: Reply) -> list[dict[str, Any]]:
        messages = await self.request.collect_messages(reply)
        return [await asyncio.to_thread(self._choice, reply, i, m) for i, m in enumerate(messages)]

    async def chunks(self, reply: Reply) -> AsyncIterator[dict[str, Any]]:
        def chunk(i: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | more

        for i, job in enumerate(reply.jobs):
            yield chunk(i, {"role": "assistant", "content": ""}, **self._prompt_ids(job))
        async for delta in self.request.deltas(reply):
            i, more = delta.index, dict[str, Any]()
            if delta.token is not None and self.body.logprobs:
                more["logprobs"] = self._logprobs(reply, [delta.token])
            if delta.token is not None and self.body.return_token_ids:
                more["token_ids"] = [delta.token.token]
            if delta.texts or more:
                yield chunk(i, delta.texts, **more)
            for k, call in enumerate(delta.calls):
                yield chunk(i, {"tool_calls": [{"index": k} | call]})
            if delta.end is not None:
                reason = "tool_calls" if delta.calls else finish_reason(delta.end)
                yield chunk(i, {}, finish_reason=reason)

    def _choice(self, reply: Reply, i: int, generated: GeneratedMessage) -> dict[str, Any]:
        calls = {"tool_calls": generated.calls} if generated.calls else {}
        empty = {"content": None if calls else "", "refusal": None}
        choice = {
            "index": i,
            "message": {"role": "assistant"} | empty | generated.texts | calls,
            "logprobs": self._logprobs(reply, [token for _, token in generated.tokens]),
            "finish_reason": "tool_calls" if calls else finish_reason(generated.end),
        }
        return choice | ({"token_ids": generated.end.tokens} if self.body.return_token_ids else {})

    def _logprobs(self, reply: Reply, tokens: list[Token]) -> dict[str, Any] | None:
        top, texts = self.body.top_logprobs or 0, reply.resolved.chosen.renderer.texts
        return {"content": texts.chat_logprobs(tokens, top)} if self.body.logprobs else None
