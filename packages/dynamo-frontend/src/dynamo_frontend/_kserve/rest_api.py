"""The REST form of the protocol, with Triton's ``generate`` extension."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable
from importlib import metadata
from typing import Any, cast

import msgspec

from dynamo_core.errors import DynamoError, InvalidRequestError, NotFoundError
from dynamo_frontend._errors import error_headers, http_status
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._kserve.inference import (
    INPUTS,
    OUTPUTS,
    PLATFORM,
    VERSION,
    InferCall,
    InputTensor,
)
from dynamo_frontend._kserve.runner import CompletionRunner, Piece
from dynamo_frontend._kserve.tensors import unpack_tensor
from dynamo_frontend._openai.fields import BodyDecoder
from dynamo_frontend._openai.stream import EVENT_STREAM, JSON
from dynamo_frontend._request_id import request_id_of

MODELS_PREFIX = "/v2/models/"
BINARY_HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data", "generate"]
_TARGET = re.compile(
    r"(?P<name>.+?)(?:/versions/(?P<version>[^/]+))?(?:/(?P<verb>ready|config|infer|generate|generate_stream))?"
)
_encode = msgspec.json.encode


class RestTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input in JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class RestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v2/models/{model}/infer``."""

    inputs: list[RestTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[RestOutput] = []


class GenerateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v2/models/{model}/generate`` and ``/generate_stream``."""

    text_input: str
    id: str = ""
    parameters: dict[str, Any] = {}


_INFER = BodyDecoder(InferRequest)
_GENERATE = BodyDecoder(GenerateBody)


class KserveRest:
    """Answers the REST form. Errors have its shape: ``{"error": message}``.

    Args:
        runner: Runs completions.
        overload_status: Status when all workers are busy.
    """

    def __init__(self, runner: CompletionRunner, *, overload_status: int) -> None:
        self._runner = runner
        self._overload_status = overload_status

    def server(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v2``."""
        version = metadata.version("dynamo-frontend")
        _send(response, {"name": PLATFORM, "version": version, "extensions": EXTENSIONS})

    def live(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v2/health/live``."""
        _send(response, {"live": True})

    def ready(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v2/health/ready``."""
        ready = self._runner.ready()
        _send(response, {"ready": ready}, status=200 if ready else 503)

    def show(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v2/models/{model}``, ``…/ready`` and ``…/config``."""
        try:
            name, version, verb = _target(request)
            model = self._runner.model(name, version)
            if verb not in ("", "ready", "config"):
                raise InvalidRequestError(f"'{verb}' takes POST.")
        except DynamoError as error:
            self._refuse(error, request, response)
            return
        if verb == "ready":
            _send(response, {"name": model.name, "ready": True})
        elif verb == "config":
            _send(response, model_config(model.name))
        else:
            _send(response, model_metadata(model.name))

    async def act(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v2/models/{model}/infer``, ``…/generate`` and ``…/generate_stream``."""
        try:
            name, version, verb = _target(request)
            await self._work(verb, name, version, request, response)
        except DynamoError as error:
            self._refuse(error, request, response)

    def _work(
        self, verb: str, name: str, version: str, request: HttpRequest, response: HttpResponse
    ) -> Awaitable[None]:
        if verb == "infer":
            return self._infer(_infer_call(name, version, request), request, response)
        if verb in ("generate", "generate_stream"):
            body = cast("GenerateBody", _GENERATE.decode(request.body))
            text = InputTensor("text_input", "BYTES", [1], [body.text_input])
            call = InferCall(name, version, body.id, body.parameters, [text])
            return self._generate(call, request, response, stream=verb == "generate_stream")
        raise NotFoundError("Use /infer, /generate or /generate_stream of a model.", reason="request.unknown_path")

    async def _infer(self, call: InferCall, request: HttpRequest, response: HttpResponse) -> None:
        if call.streaming:
            raise InvalidRequestError("The input streaming is true; use /generate_stream or gRPC.", param="streaming")
        piece = await self._whole(call, request, response)
        wanted = call.outputs or [name for name, _, _ in OUTPUTS]
        data = {"text_output": piece.texts, "finish_reason": piece.reasons}
        outputs = [
            {"name": name, "datatype": "BYTES", "shape": [len(data[name])], "data": data[name]} for name in wanted
        ]
        _send(response, {**_head(call), "outputs": outputs})

    async def _generate(self, call: InferCall, request: HttpRequest, response: HttpResponse, *, stream: bool) -> None:
        if call.parameters.get("n", 1) != 1:
            raise InvalidRequestError("generate gives one choice; leave n out, or use /infer.", param="n")
        if not stream:
            piece = await self._whole(call, request, response)
            _send(response, {**_head(call), "text_output": piece.texts[0], "finish_reason": piece.reasons[0]})
            return
        pieces = await self._runner.start(call, request, stream=True)
        with contextlib.closing(pieces):
            response.on_disconnect(pieces.close)
            try:
                async for piece in pieces:
                    if not response.started:
                        response.start(200, EVENT_STREAM)
                    shown = {"text_output": piece.texts[0], "finish_reason": piece.reasons[0] or None}
                    response.write(b"data: " + _encode({**_head(call), **shown}) + b"\n\n")
            except DynamoError as error:
                if not response.started:
                    raise
                response.write(b"data: " + _encode({"error": error.message}) + b"\n\n")
            response.end()

    async def _whole(self, call: InferCall, request: HttpRequest, response: HttpResponse) -> Piece:
        pieces = await self._runner.start(call, request, stream=False)
        with contextlib.closing(pieces):
            response.on_disconnect(pieces.close)
            (piece,) = [piece async for piece in pieces]
        return piece

    def _refuse(self, error: DynamoError, request: HttpRequest, response: HttpResponse) -> None:
        headers = {"x-request-id": request_id_of(request), **error_headers(error)}
        response.send(http_status(error, self._overload_status), kserve_error(error), JSON, headers)


def kserve_error(error: DynamoError) -> bytes:
    """Return the error in this API's form."""
    return _encode({"error": error.message})


def model_metadata(name: str) -> dict[str, Any]:
    """Return a text model's metadata."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": n, "datatype": kind, "shape": shape} for n, kind, shape in INPUTS],
        "outputs": [{"name": n, "datatype": kind, "shape": shape} for n, kind, shape in OUTPUTS],
    }


def model_config(name: str) -> dict[str, Any]:
    """Return a text model's configuration in Triton's form."""
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": 0,
        "input": [_config_tensor(item) for item in INPUTS],
        "output": [_config_tensor(item) for item in OUTPUTS],
        "model_transaction_policy": {"decoupled": True},
    }


def _config_tensor(item: tuple[str, str, list[int]]) -> dict[str, Any]:
    name, kind, dims = item
    return {"name": name, "data_type": "TYPE_STRING" if kind == "BYTES" else f"TYPE_{kind}", "dims": dims}


def _target(request: HttpRequest) -> tuple[str, str, str]:
    match = _TARGET.fullmatch(request.path[len(MODELS_PREFIX) :])
    if match is None:
        raise NotFoundError("Name a model behind /v2/models/.", reason="model_not_found", param="model")
    return match["name"], match["version"] or "", match["verb"] or ""


def _infer_call(name: str, version: str, request: HttpRequest) -> InferCall:
    head = request.header(BINARY_HEADER)
    if head and not (head.isdigit() and int(head) <= len(request.body)):
        raise InvalidRequestError(f"{BINARY_HEADER} must be the length of the JSON part.", param=BINARY_HEADER)
    length = int(head) if head else len(request.body)
    body = cast("InferRequest", _INFER.decode(request.body[:length]))
    rest = request.body[length:]
    inputs: list[InputTensor] = []
    for tensor in body.inputs:
        size = tensor.parameters.get("binary_data_size")
        if tensor.data is not None:
            data: Any = _flat(tensor.data)
        elif isinstance(size, int) and 0 <= size <= len(rest):
            data, rest = unpack_tensor(tensor.name, tensor.datatype, rest[:size]), rest[size:]
        else:
            raise InvalidRequestError(f"The input {tensor.name[:100]} has no data.", param=tensor.name)
        inputs.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, data))
    if rest:
        raise InvalidRequestError(f"{len(rest)} bytes behind the JSON belong to no input.", param="inputs")
    return InferCall(name, version, body.id, body.parameters, inputs, [item.name for item in body.outputs])


def _flat(data: list[Any]) -> list[Any]:
    """Return row-major elements; nested lists of one more level are allowed by the protocol."""
    if any(isinstance(item, list) for item in data):
        return [element for item in data for element in (cast("list[Any]", item) if isinstance(item, list) else [item])]
    return data


def _head(call: InferCall) -> dict[str, Any]:
    head = {"model_name": call.model, "model_version": VERSION}
    return {"id": call.call_id, **head} if call.call_id else head


def _send(response: HttpResponse, body: dict[str, Any], *, status: int = 200) -> None:
    response.send(status, _encode(body), JSON)
