"""The inspector: a web page at `/`. Its files are read and compressed once, and sent with a strict security policy."""

import gzip
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.json_stream import GZIP_HEADERS, accepts_gzip

_FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No other origins and no inline scripts: text that a model writes can never run as code.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidate each time; 304 while unchanged
}


def inspector() -> list[Route]:
    """Routes of `/` and `/web/...`: one per file, so that no request path is ever looked up on disk."""
    return [_route(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES]


def _route(path: Path) -> Route:
    data, media_type = path.read_bytes(), _TYPES[path.suffix]
    zipped = gzip.compress(data, mtime=0)
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = _HEADERS | {"ETag": tag, "Vary": GZIP_HEADERS["Vary"]}

    async def serve_file(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if accepts_gzip(request):
            return Response(zipped, headers=headers | GZIP_HEADERS, media_type=media_type)
        return Response(data, headers=headers, media_type=media_type)

    return Route("/" if path.name == _INDEX else f"/web/{path.name}", serve_file)
