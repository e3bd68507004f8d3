"""The inspector's files as served. tests/integration/browser tests what they do."""

import re

from serve.api.inspector import inspector
from tests.support.http_client import Server

PATHS = [route.path for route in inspector()]
_MOST = 100_000  # bytes, compressed; the page's limit is 250 kB


SERVER_OPTIONS = {"api_key": ("secret",)}


async def test_inspector_is_public_with_policy(server: Server) -> None:
    assert "/" in PATHS
    for path in PATHS:
        response = await server.client.get(path)
        assert response.status_code == 200
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert (await server.client.get("/v1/models")).status_code == 401


async def test_inspector_loads_nothing_from_other_origins(server: Server) -> None:
    """Files refer to each other by relative URLs, so that a proxy can serve them under any path."""
    texts = {path: (await server.client.get(path)).text for path in PATHS}
    for path, text in texts.items():
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), path
        assert not re.search(r"<script(?! type=\"module\" src)|\son\w+=|style=", text), path
        links = re.findall(r'(?:href|src)="([^"#]+)"', text) if path == "/" else []
        assert {f"/{name}" for name in links} <= {*PATHS, "/docs"}
        imported = re.findall(r'from "\./([^"]+)"', text)
        assert {f"/web/{name}" for name in imported} <= {*PATHS}
    assert len(re.findall("import ", texts["/web/main.js"])) > 3


async def test_inspector_gzip_and_etag(server: Server) -> None:
    sizes = []
    for path in PATHS:
        response = await server.client.get(path, headers={"Accept-Encoding": "gzip"})
        assert response.headers["content-encoding"] == "gzip"
        plain = await server.client.get(path, headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.content == response.content  # the client has decompressed it
        sizes.append(int(response.headers["content-length"]))
        assert sizes[-1] < len(plain.content) + 100
        again = await server.client.get(path, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        response = await server.client.get(path, headers={"If-None-Match": '"another"'})
        assert response.status_code == 200
    assert sum(sizes) < _MOST
