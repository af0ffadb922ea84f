"""`GET /v1/models/events`: the list of models, and what changes of it, as server-sent events."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from sse_starlette import EventSourceResponse

from lorafold.serving.feed import Feed
from lorafold.serving.keys import Caller
from lorafold.serving.refusal import Refusal
from lorafold.serving.server import Server, authorization, record_of


def routes(server: Server) -> APIRouter:
    """The router. It comes before that of models, one of which could be called `events`."""
    router, limits = APIRouter(), server.settings.limits
    feed, held = Feed(server), Counter[str]()

    def may_listen(request: Request) -> tuple[Caller, bool]:
        """Who listens, and whether it is the administrator. Raises Refusal as any route does."""
        sent = authorization(request.headers)
        try:
            return server.keys.admin(sent), True
        except Refusal:
            return server.keys.caller(sent), False

    @router.get("/v1/models/events")
    async def events(request: Request) -> Response:
        """Every model that the caller may name, then those that changed, once a second at most."""
        who = may_listen(request)
        caller, record = who[0], record_of(request)
        record.tenant = caller.tenant
        if server.host.draining:
            raise Refusal(503, "not_ready", server.host.ready, retry_after=1)
        if held[caller.tenant] >= limits.tenant_streams:
            told = f"{held[caller.tenant]} such streams are open, expected at most"
            raise Refusal(429, "too_many_streams", f"{told} {limits.tenant_streams} with this one")
        if record.method == "HEAD":
            return Response(media_type="text/event-stream")
        held[caller.tenant] += 1
        ended = False

        def end() -> None:
            nonlocal ended
            held[caller.tenant] -= not ended
            ended = True

        async def following() -> AsyncIterator[bytes]:
            stream = feed.events(*who)
            try:
                async for one in stream:
                    if may_listen(request) != who:  # its key is another one by now
                        break
                    yield one
            except Refusal as refusal:
                record.outcome = refusal.code
            finally:
                await stream.aclose()
                end()

        async def left(_: object) -> None:  # perhaps before the first event
            end()

        return EventSourceResponse(
            following(), ping=15, sep="\n", send_timeout=limits.send_seconds,
            client_close_handler_callable=left,
        )  # fmt: skip

    return router
