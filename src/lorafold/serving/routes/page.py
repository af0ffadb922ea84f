"""The web page at `/`, and adapters' own pages."""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePath
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response

from lorafold.serving.keys import Caller
from lorafold.serving.refusals import Refusal
from lorafold.serving.server import Server

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE_FILES = (
    "page.css", "page.js", "api.js", "chat.js", "answer.js", "markdown.js", "difference.js",
    "table.js", "manage.js",
)  # fmt: skip
FILES = {  # by path; /look.css is shared by all pages
    "/": "serving/page/index.html",
    "/look.css": "files/look.css",
    **{f"/{name}": f"serving/page/{name}" for name in PAGE_FILES},
}
# only this origin, no frames
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
# an adapter's page is untrusted: it may not run, send or load anything
ADAPTER_PAGE_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MAX_FORM_BYTES = 4096  # bytes of a form, which is read before the key is checked


def routes(app: FastAPI, server: Server) -> None:
    registry, place = server.registry, files("lorafold")
    content = {path: (place / file).read_bytes() for path, file in FILES.items()}

    async def page(request: Request) -> Response:
        """Returns the web page and its files."""
        path = request.url.path
        headers = {
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        kind = TYPES[PurePath(FILES[path]).suffix]
        return Response(content[path], media_type=f"{kind}; charset=utf-8", headers=headers)

    for path in FILES:
        app.add_api_route(path, page)

    async def adapter_page(caller: Caller, name: str) -> Response:
        def content() -> bytes:
            known = name in registry.adapters and caller.may_use(name)
            file = registry.directory.page_file(name) if known else None
            if file is None:
                message = f"adapter: {name[:80]!r} has no page, or your key may not use it"
                raise Refusal(404, "model_not_found", message, "model")
            return file.read_bytes()

        policy = {"Content-Security-Policy": ADAPTER_PAGE_POLICY}
        headers = policy | {"X-Content-Type-Options": "nosniff"}
        html = await server.host.in_thread(content, caller.tenant)
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/v1/adapters/{name}/page")
    async def inspected(request: Request, name: str) -> Response:
        """Returns the page that `lorafold inspect` wrote for an adapter."""
        return await adapter_page(server.caller(request), name)

    @app.post("/v1/adapters/{name}/page")
    async def opened(request: Request, name: str) -> Response:
        """Returns the same for a form with the key, because a browser sends no such header when it
        opens a page, and keys in URLs end up in histories and logs.
        """
        content = b""
        async for part in request.stream():
            if len(content := content + part) > MAX_FORM_BYTES:
                message = f"body: expected at most {MAX_FORM_BYTES:,} bytes"
                raise Refusal(413, "body_too_large", message)
        form = parse_qs(content.decode("ascii", "replace"))
        caller = server.caller(request, f"Bearer {form.get('key', [''])[0]}")
        return await adapter_page(caller, name)
