"""The web page at `/`, and the pages of adapters."""

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
# allows only this origin, and no frames
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
# an adapter's page is untrusted, so it may not run scripts, send data or load resources
UNTRUSTED_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MAX_FORM = 4096  # bytes; limited, because a form is read before its key is checked


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

    async def page_of(caller: Caller, name: str) -> Response:
        def content() -> bytes:
            known = name in registry.adapters and caller.may_use(name)
            file = registry.directory.page_file(name) if known else None
            if file is None:
                message = f"adapter: {name[:80]!r} has no page, or your key may not use it"
                raise Refusal(404, "model_not_found", message, "model")
            return file.read_bytes()

        headers = {"Content-Security-Policy": UNTRUSTED_POLICY, "X-Content-Type-Options": "nosniff"}
        html = await server.host.in_thread(content, caller.tenant)
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/v1/adapters/{name}/page")
    async def inspected(request: Request, name: str) -> Response:
        """Returns the page that `lorafold lab inspect` wrote for an adapter."""
        return await page_of(server.caller(request), name)

    @app.post("/v1/adapters/{name}/page")
    async def opened(request: Request, name: str) -> Response:
        """Returns an adapter's page for a form that contains the key. A browser sends no
        Authorization header when it opens a page, and keys in URLs end up in histories and logs.
        """
        content = b""
        async for part in request.stream():
            if len(content := content + part) > MAX_FORM:
                raise Refusal(413, "body_too_large", f"body: expected at most {MAX_FORM:,} bytes")
        form = parse_qs(content.decode("ascii", "replace"))
        return await page_of(server.caller(request, f"Bearer {form.get('key', [''])[0]}"), name)
