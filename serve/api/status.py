"""GET endpoints about the server: models, health, load, version and metrics."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve import __version__
from serve.api.context import Context
from serve.api.json_stream import dump
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.api.middleware import Readiness
from serve.api.validation import served_name


class Status:
    def __init__(self, context: Context, metrics: Metrics, readiness: Readiness) -> None:
        self._context = context
        self._metrics = metrics
        self._readiness = readiness

    async def models(self, _: Request) -> Response:
        cards = [self._card(name) for name in self._context.model.names]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        if f"/{name}" in self._context.model.names:  # double slashes have been collapsed
            name = f"/{name}"
        return _json(self._card(served_name(name, self._context.model.names)))

    async def health(self, _: Request) -> Response:
        """200 if requests are accepted, else 503."""
        return Response(status_code=200 if self._context.engine.ready and not self._readiness.draining else 503)

    async def load(self, _: Request) -> Response:
        return _json({"server_load": self._context.engine.load})

    async def version(self, _: Request) -> Response:
        return _json({"version": __version__})

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _card(self, name: str) -> dict[str, Any]:
        limits = self._context.engine.limits
        return {
            "id": name,
            "object": "model",
            "created": self._context.created,
            "owned_by": "logprobd",
            "root": self._context.model.names[0],
            "parent": None,
            "max_model_len": limits.max_model_len,
            "max_logprobs": limits.max_logprobs,
            "whole_vocabulary": limits.whole_vocabulary,
        }


def _json(value: Any) -> Response:
    return Response(dump(value), media_type="application/json")
