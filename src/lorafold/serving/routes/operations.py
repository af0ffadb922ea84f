"""What keeps a server running asks: `/livez`, `/readyz`, `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lorafold.serving.server import Server, answer


def routes(server: Server) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.get("/livez")
    async def live() -> Response:
        """Whether the process answers at all."""
        return answer({"status": "alive"})

    @router.get("/readyz")
    @router.get("/health")
    async def ready() -> Response:
        """Whether requests are computed: the engine made a step lately."""
        why = server.host.ready
        response = answer({"status": why or "ready"})
        response.status_code = 503 if why else 200
        return response

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counters in Prometheus's format; they name tenants, so that keys close them."""
        server.keys.check_metrics(request.headers.get("authorization"))
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
