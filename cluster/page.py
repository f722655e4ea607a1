"""The live page at /ui: files of ``dashboards/page``, read once. They name no other host, and a browser is told to ask
none."""

import hashlib
from http import HTTPStatus
from importlib import resources

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from cluster.api_errors import error_answer

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept, and asked for again by its tag: a page never mixes files of two releases for longer than a reload.
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The routes, to be put before any that matches everything."""
    files = {
        file.name: _answer_of(file.name, file.read_bytes())
        for file in resources.files("dashboards").joinpath("page").iterdir()
        if file.name.rpartition(".")[2] in _TYPES
    }

    async def to_folder(request: Request) -> Response:
        return RedirectResponse("ui/", HTTPStatus.PERMANENT_REDIRECT)

    async def page(request: Request) -> Response:
        name = request.path_params.get("name") or "index.html"
        if (found := files.get(name)) is None:
            return error_answer(f"the live page has no file {name}; it is at /ui/", HTTPStatus.NOT_FOUND)
        if found.headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=_HEADERS | {"ETag": found.headers["etag"]})
        return found

    return [Route("/ui", to_folder), Route("/ui/", page), Route("/ui/{name}", page)]


def _answer_of(name: str, content: bytes) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS | {"ETag": tag})
