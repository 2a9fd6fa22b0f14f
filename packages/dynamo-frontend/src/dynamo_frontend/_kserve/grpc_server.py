"""The gRPC form of the protocol. grpcio and protobuf come with the extra ``kserve`` and are imported when it starts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any

import structlog

from dynamo_core.errors import ConfigurationError, DynamoError, ErrorClass, InvalidRequestError, as_dynamo_error
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._kserve.credentials import TlsFiles, server_credentials
from dynamo_frontend._kserve.inference import INPUTS, OUTPUTS, PLATFORM, VERSION, InferCall, InputTensor
from dynamo_frontend._kserve.runner import CompletionRunner, Piece
from dynamo_frontend._kserve.schema import Method, Schema
from dynamo_frontend._kserve.tensors import pack_bytes, unpack_tensor
from dynamo_frontend._routes import Door

_log = structlog.get_logger(__name__)
MAX_CALLS_PER_STREAM = 64
_FREE = frozenset({"ServerLive", "ServerReady", "ModelReady"})
_STATUS = {
    ErrorClass.INVALID_REQUEST: "INVALID_ARGUMENT",
    ErrorClass.UNAUTHENTICATED: "UNAUTHENTICATED",
    ErrorClass.PERMISSION_DENIED: "PERMISSION_DENIED",
    ErrorClass.NOT_FOUND: "NOT_FOUND",
    ErrorClass.PAYLOAD_TOO_LARGE: "INVALID_ARGUMENT",
    ErrorClass.UNSUPPORTED_MEDIA: "INVALID_ARGUMENT",
    ErrorClass.RATE_LIMITED: "RESOURCE_EXHAUSTED",
    ErrorClass.CAPACITY_EXHAUSTED: "RESOURCE_EXHAUSTED",
    ErrorClass.UNAVAILABLE: "UNAVAILABLE",
    ErrorClass.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    ErrorClass.CANCELLED: "CANCELLED",
    ErrorClass.NOT_IMPLEMENTED: "UNIMPLEMENTED",
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "BYTES": "bytes_contents",
}
_CONFIG_TYPES = {"BOOL": 1, "INT64": 9, "BYTES": 13}


class KserveGrpcServer:
    """Serves the protocol on a port of its own.

    Args:
        runner: Runs completions.
        door: Asked before every call but those about health; None lets everyone in.
    """

    def __init__(self, runner: CompletionRunner, door: Door | None = None) -> None:
        self._runner = runner
        self._door = door
        self._server: Any = None
        self._grpc: Any = None
        self._schema: Any = None
        self.port = 0

    async def start(
        self, host: str, port: int, *, body_bytes: int, reuse_port: bool = False, tls: TlsFiles | None = None
    ) -> None:
        """Listen.

        Args:
            host: Address.
            port: Port; 0 for a free one.
            body_bytes: Largest message.
            reuse_port: Whether other processes may listen on the same port.
            tls: Files of the certificate; None for plain text.

        Raises:
            ConfigurationError: if grpcio is not installed, or the address cannot be had.
        """
        try:
            import grpc

            self._schema = Schema()
        except ImportError as error:
            raise ConfigurationError(
                "KServe over gRPC needs grpcio and protobuf: pip install 'dynamo-frontend[kserve]', "
                "or leave --kserve-grpc-port out"
            ) from error
        self._grpc = grpc
        options = [("grpc.so_reuseport", int(reuse_port)), ("grpc.max_receive_message_length", body_bytes)]
        server = grpc.aio.server(options=options)
        handlers = {method.name: self._handler(method) for method in self._schema.methods}
        name = f"{Schema.package}.{Schema.service}"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, server_credentials(grpc, tls))
        except RuntimeError as error:
            raise ConfigurationError(
                f"KServe gRPC {address} cannot be listened on; choose another with --kserve-grpc-port"
            ) from error
        await server.start()
        self._server = server
        _log.info("kserve listens", address=f"{host}:{self.port}")

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls, let running ones finish within the time, end the rest. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)

    def _handler(self, method: Method) -> Any:
        request, response = getattr(self._schema, method.request), getattr(self._schema, method.response)
        codec = {"request_deserializer": request.FromString, "response_serializer": response.SerializeToString}
        if method.streams:
            return self._grpc.stream_stream_rpc_method_handler(self._stream_infer, **codec)
        answer = self._guarded(self._unary()[method.name], free=method.name in _FREE)
        return self._grpc.unary_unary_rpc_method_handler(answer, **codec)

    def _unary(self) -> dict[str, Any]:
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelInfer": self._model_infer,
        }

    def _guarded(self, answer: Any, *, free: bool) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            try:
                return await answer(request, self._admitted(context, free=free))
            except DynamoError as error:
                status = getattr(self._grpc.StatusCode, _STATUS.get(error.error_class, "INTERNAL"))
                await context.abort(status, error.message)

        return handle

    def _admitted(self, context: Any, *, free: bool = False) -> HttpRequest:
        """Return the call as a request with its caller.

        Raises:
            UnauthenticatedError, RateLimitedError: as the door says.
        """
        # Binary entries of the metadata have no form as headers.
        headers = {k.lower(): v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        request = HttpRequest("POST", "/v2/models", headers=headers)
        if self._door is not None and not free:
            self._door.admit(request)
        return request

    # --- one answer

    async def _server_live(self, request: Any, head: HttpRequest) -> Any:
        return self._schema.ServerLiveResponse(live=True)

    async def _server_ready(self, request: Any, head: HttpRequest) -> Any:
        return self._schema.ServerReadyResponse(ready=self._runner.ready())

    async def _server_metadata(self, request: Any, head: HttpRequest) -> Any:
        return self._schema.ServerMetadataResponse(name=PLATFORM, version=metadata.version("dynamo-frontend"))

    async def _model_ready(self, request: Any, head: HttpRequest) -> Any:
        try:
            self._runner.model(request.name, request.version)
        except DynamoError:
            return self._schema.ModelReadyResponse(ready=False)
        return self._schema.ModelReadyResponse(ready=True)

    async def _model_metadata(self, request: Any, head: HttpRequest) -> Any:
        model = self._runner.model(request.name, request.version)
        tensor = self._schema.TensorMetadata
        return self._schema.ModelMetadataResponse(
            name=model.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[tensor(name=name, datatype=kind, shape=shape) for name, kind, shape in INPUTS],
            outputs=[tensor(name=name, datatype=kind, shape=shape) for name, kind, shape in OUTPUTS],
        )

    async def _model_config(self, request: Any, head: HttpRequest) -> Any:
        model = self._runner.model(request.name, request.version)
        schema = self._schema

        def tensors(items: tuple[tuple[str, str, list[int]], ...]) -> list[Any]:
            return [schema.ModelTensor(name=n, data_type=_CONFIG_TYPES[kind], dims=dims) for n, kind, dims in items]

        config = schema.ModelConfig(
            name=model.name, platform=PLATFORM, backend=PLATFORM, input=tensors(INPUTS), output=tensors(OUTPUTS)
        )
        config.model_transaction_policy.decoupled = True
        return schema.ModelConfigResponse(config=config)

    async def _model_infer(self, request: Any, head: HttpRequest) -> Any:
        call = _call(request)
        if call.streaming:
            raise InvalidRequestError("The input streaming is true; use ModelStreamInfer.", param="streaming")
        pieces = await self._runner.start(call, head, stream=False)
        with contextlib.closing(pieces):
            (piece,) = [piece async for piece in pieces]
        return self._response(call, piece, raw=_is_raw(request))

    # --- streams

    async def _stream_infer(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Answer every request of a stream, several at a time; an error ends its request, not the stream."""
        places = asyncio.Semaphore(MAX_CALLS_PER_STREAM)
        turn = asyncio.Lock()

        async def send(message: Any) -> None:
            async with turn:
                await context.write(message)

        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await places.acquire()
                task = group.create_task(self._stream_one(request, context, send))
                task.add_done_callback(lambda _: places.release())

    async def _stream_one(self, request: Any, context: Any, send: Any) -> None:
        answer = self._schema.ModelStreamInferResponse
        try:
            head = self._admitted(context)
            call = _call(request)
            pieces = await self._runner.start(call, head, stream=call.streaming)
            with contextlib.closing(pieces):
                async for piece in pieces:
                    await send(answer(infer_response=self._response(call, piece, raw=_is_raw(request))))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the other requests of the stream go on
            typed = as_dynamo_error(error)
            failed = answer(error_message=typed.message)
            failed.infer_response.id = request.id
            await send(failed)

    def _response(self, call: InferCall, piece: Piece, *, raw: bool) -> Any:
        schema = self._schema
        found = schema.ModelInferResponse(model_name=call.model, model_version=VERSION, id=call.call_id)
        if call.streaming and call.final_marker:
            found.parameters["triton_final_response"].bool_param = piece.last
        for name, values in (("text_output", piece.texts), ("finish_reason", piece.reasons)):
            if call.outputs and name not in call.outputs:
                continue
            data = [value.encode() for value in values]
            tensor = found.outputs.add(name=name, datatype="BYTES", shape=[len(data)])
            if raw:
                found.raw_output_contents.append(pack_bytes(data))
            else:
                tensor.contents.bytes_contents.extend(data)
        return found


def _call(request: Any) -> InferCall:
    if request.raw_input_contents and len(request.raw_input_contents) != len(request.inputs):
        raise InvalidRequestError(
            f"raw_input_contents has {len(request.raw_input_contents)} entries for {len(request.inputs)} inputs.",
            param="raw_input_contents",
        )
    inputs: list[InputTensor] = []
    for index, tensor in enumerate(request.inputs):
        if request.raw_input_contents:
            data: Any = unpack_tensor(tensor.name, tensor.datatype, request.raw_input_contents[index])
        else:
            data = list(getattr(tensor.contents, _CONTENTS.get(tensor.datatype, "bytes_contents")))
        inputs.append(InputTensor(tensor.name, tensor.datatype, list(tensor.shape), data))
    parameters = {name: _value(value) for name, value in request.parameters.items()}
    outputs = [output.name for output in request.outputs]
    return InferCall(request.model_name, request.model_version, request.id, parameters, inputs, outputs)


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None


def _is_raw(request: Any) -> bool:
    return bool(request.raw_input_contents)
