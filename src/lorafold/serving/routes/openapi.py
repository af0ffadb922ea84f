"""`GET /openapi.json`: the routes and the bodies that they take, as OpenAPI describes an API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from lorafold.serving.routes.admin import Loaded, Named, Pointed
from lorafold.serving.server import Server, answer
from lorafold.serving.wire import messages, response
from lorafold.serving.wire.body import Body
from lorafold.serving.wire.chat import Chat
from lorafold.serving.wire.completion import Completion, Detokenize, Tokenize

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/responses": response.Respond,
    "/v1/responses/input_tokens": response.Count,
    "/v1/messages": messages.Ask,
    "/v1/messages/count_tokens": messages.Count,
    "/tokenize": Tokenize,
    "/detokenize": Detokenize,
    "/v1/load_lora_adapter": Loaded,
    "/v1/unload_lora_adapter": Named,
    "/admin/aliases/{name}": Pointed,
}
KEY = {"key": {"type": "http", "scheme": "bearer"}}


def routes(server: Server) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.get("/openapi.json")
    async def schema(request: Request) -> Response:
        """This description, the same for everybody."""
        return answer(described(request.app.routes))

    return router


def described(routes: list[Any]) -> dict[str, Any]:
    """The description of these routes."""
    found = get_openapi(title="lorafold", version="1", routes=routes)
    kinds: Any = [(kind, "validation") for kind in dict.fromkeys(BODIES.values())]
    names, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            if path in BODIES and method in ("post", "put"):
                schema = names[BODIES[path], "validation"]
                content = {"application/json": {"schema": schema}}
                operation["requestBody"] = {"required": True, "content": content}
    found["components"] = {"schemas": schemas.get("$defs", {}), "securitySchemes": KEY}
    return found | {"security": [{"key": []}]}
