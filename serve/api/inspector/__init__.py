"""The inspector: a web page at `/`. Its files are read and compressed once, and sent with a strict security policy."""

import gzip
import hashlib
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    zipped: bytes
    media_type: str
    tag: str  # ETag

    def answer(self, request: Request) -> Response:
        """The file, or 304 if the browser has it."""
        headers = _HEADERS | {"ETag": self.tag, "Vary": GZIP_HEADERS["Vary"]}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if accepts_gzip(request):
            return Response(self.zipped, headers=headers | GZIP_HEADERS, media_type=self.media_type)
        return Response(self.data, headers=headers, media_type=self.media_type)


def inspector() -> list[Route]:
    """Routes of `/` and `/web/...`: one per file, so that no request path is ever looked up on disk."""
    files = sorted(path for path in _FOLDER.iterdir() if path.suffix in _TYPES)
    return [_route("/" if path.name == _INDEX else f"/web/{path.name}", _read(path)) for path in files]


def _read(path: Path) -> _File:
    data = path.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    return _File(data, gzip.compress(data, mtime=0), _TYPES[path.suffix], tag)


def _route(path: str, file: _File) -> Route:
    async def serve_file(request: Request) -> Response:
        return file.answer(request)

    return Route(path, serve_file)
