"""Models, health and metrics."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from dynamo_core.component import HealthBoard
from dynamo_core.errors import NotFoundError
from dynamo_frontend._catalog import Catalog, ServedModel
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._metrics import FrontendMetrics

JSON = "application/json"
MODELS_PATH = "/v1/models"
_READY_SUFFIX = "/ready"


class StatusApi:
    """Answers what needs no worker.

    Args:
        catalog: Models.
        board: Health of the process's parts.
        metrics: What ``/metrics`` shows.
        draining: Whether the frontend is leaving.
    """

    def __init__(
        self, catalog: Catalog, board: HealthBoard, metrics: FrontendMetrics, draining: Callable[[], bool]
    ) -> None:
        self._catalog = catalog
        self._board = board
        self._metrics = metrics
        self._draining = draining

    def models(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v1/models``: the models that can answer."""
        data = [_model_object(name, model) for model in self._catalog.models() for name in _names(model)]
        _send(response, 200, {"object": "list", "data": data})

    def model(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v1/models/{id}``, and ``GET /v1/models/{id}/ready``."""
        name = urllib.parse.unquote(request.path[len(MODELS_PATH) + 1 :])
        for model in self._catalog.models():
            if name in _names(model):
                _send(response, 200, _model_object(name, model))
                return
        if name.endswith(_READY_SUFFIX):
            model = self._catalog.find(name.removesuffix(_READY_SUFFIX))
            workers = sum(record.endpoint == model.endpoint for record in model.records.values())
            _send(response, 200, {"id": model.name, "object": "model.readiness", "ready": True, "workers": workers})
            return
        raise NotFoundError(f"The model '{name}' does not exist.", reason="model_not_found", param="model")

    def live(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /live``: the process runs."""
        _send(response, 200, {"status": "live"})

    def health(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /health``: open for requests, with the models that can answer."""
        if self._draining():
            _send(response, 503, {"status": "not_ready", "stage": "draining"})
            return
        models = self._catalog.models()
        endpoints = sorted({str(model.endpoint) for model in models})
        _send(response, 200, {"status": "healthy", "endpoints": endpoints, "models": [m.name for m in models]})

    def ready(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /ready``: whether a request could be answered, with the reasons if not."""
        report = self._board.report()
        models = [model.name for model in self._catalog.models()]
        ready = self._board.ready and bool(models) and not self._draining()
        reasons = [
            f"{name}: {health.reason or health.state.value}" for name, health in report.items() if not health.ready
        ]
        body: dict[str, Any] = {"status": "ready" if ready else "not_ready", "models": models}
        if not ready:
            body["reasons"] = [*reasons, *self._catalog.failures(), *([] if models else ["no model is ready"])]
        _send(response, 200 if ready else 503, body)

    def metrics(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /metrics``."""
        response.send(200, generate_latest(self._metrics.registry), CONTENT_TYPE_LATEST)


def _names(model: ServedModel) -> tuple[str, ...]:
    return (model.name, *model.card.aliases)


def _model_object(name: str, model: ServedModel) -> dict[str, Any]:
    card = model.card
    found: dict[str, Any] = {"id": name, "object": "model", "created": model.created_s, "owned_by": "dynamo"}
    if card.context_length:
        found["context_window"] = card.context_length
        found["max_model_len"] = card.context_length
    if card.lora is not None:
        found["parent"] = card.lora.base_model
    elif name != model.name:
        found["root"] = model.name
    return found


def _send(response: HttpResponse, status: int, body: dict[str, Any]) -> None:
    response.send(status, msgspec.json.encode(body), JSON)
