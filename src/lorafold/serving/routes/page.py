"""The page at `/`, which talks to the API as any client does, and the adapters' own pages."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request, Response

from lorafold.serving.refusal import Refusal
from lorafold.serving.server import Server

FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
# nothing from elsewhere, and nothing of ours in another's frame
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
# an adapter's page is its maker's: it may not run, send or load anything
SHUT = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def routes(server: Server) -> APIRouter:
    """The router."""
    router, registry = APIRouter(), server.registry
    place = files("lorafold.serving") / "page"
    content = {name: (place / file).read_bytes() for name, (file, _) in FILES.items()}

    @router.get("/")
    @router.get("/page.css")
    @router.get("/page.js")
    async def page(request: Request) -> Response:
        """The page and its two files."""
        name = request.url.path.removeprefix("/")
        headers = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(content[name], media_type=FILES[name][1], headers=headers)

    @router.get("/v1/adapters/{name}/page")
    async def inspected(request: Request, name: str) -> Response:
        """The page that `lorafold inspect` wrote for an adapter."""
        caller = server.caller(request)
        known = name in registry.found and caller.may(name)
        file = registry.directory.page(name) if known else None
        if file is None:
            told = f"adapter: found no {name[:80]!r} with a page that you may see"
            raise Refusal(404, "model_not_found", told, "model")
        headers = {"Content-Security-Policy": SHUT, "X-Content-Type-Options": "nosniff"}
        found = await server.host.think(file.read_bytes)
        return Response(found, media_type="text/html; charset=utf-8", headers=headers)

    return router
