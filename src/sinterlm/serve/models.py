"""``GET /v1/models`` and ``/v1/models/{name}``: one card per name of the served model."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sinterlm.serve.protocol.answers import ModelCard, ModelList
from sinterlm.serve.served import ServedModel


class Models:
    """The two handlers."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def list_models(self, request: Request) -> Response:
        """Every name."""
        cards = [self._card(name) for name in self._served.names]
        return json_answer(ModelList(data=cards))

    async def show_model(self, request: Request) -> Response:
        """One name. Raises ApiError 404."""
        name: str = request.path_params["name"]
        self._served.check_name(name)
        return json_answer(self._card(name))

    def _card(self, name: str) -> ModelCard:
        served = self._served
        return ModelCard(
            id=name, created=served.created, root=served.root, max_model_len=served.max_model_len
        )


def json_answer(content: msgspec.Struct) -> Response:
    """A struct as the body of a 200."""
    return Response(msgspec.json.encode(content), media_type="application/json")
