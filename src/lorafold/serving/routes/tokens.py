"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import Field

from lorafold.serving.keys import Caller
from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.rendering import Renderer
from lorafold.serving.server import Server, answer, unless_left
from lorafold.serving.wire.answers import as_json
from lorafold.serving.wire.body import Body, Listed
from lorafold.serving.wire.chat import Chat


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
    tokens: Annotated[Listed[int], Field(max_length=1 << 16)]  # a text that one call makes at once


def routes(app: FastAPI, server: Server) -> None:
    """Add them."""

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
                chat = Chat(model="", messages=body.messages or [], tools=body.tools)
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
