"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve.api.context import Endpoint
from serve.api.json_stream import dump


class Models:
    """The endpoint: a card for every served name."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._at = endpoint

    async def list(self, _: Request) -> Response:
        """All cards."""
        cards = [self._card(name) for name in self._at.model.names]
        return Response(dump({"object": "list", "data": cards}), media_type="application/json")

    async def one(self, request: Request) -> Response:
        """One card; ids may hold slashes."""
        name = request.path_params["id"]
        if f"/{name}" in self._at.model.names:  # a local path, whose double slash was collapsed
            name = f"/{name}"
        name = self._at.model_name(name)
        return Response(dump(self._card(name)), media_type="application/json")

    def _card(self, name: str) -> dict[str, Any]:
        limits = self._at.engine.limits
        return {
            "id": name,
            "object": "model",
            "created": self._at.created,
            "owned_by": "logprobd",
            "root": self._at.model.names[0],
            "parent": None,
            "max_model_len": limits.max_model_len,
            "max_logprobs": limits.max_logprobs,
            "whole_vocabulary": limits.whole_vocabulary,
        }
