"""``/openapi.json``, made from the very types that decode the requests."""

from __future__ import annotations

import functools
import re
from importlib import metadata
from typing import Any

import msgspec

from dynamo_frontend._anthropic.fields import CountTokensRequest, MessagesRequest
from dynamo_frontend._embeddings.api import EmbeddingRequest
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._kserve.rest_api import GenerateBody, InferRequest
from dynamo_frontend._openai.fields import ChatRequest, CompletionRequest
from dynamo_frontend._rerank.api import RerankRequest
from dynamo_frontend._responses.fields import InputTokensRequest, ResponsesRequest
from dynamo_frontend._tokens.generate_api import TokenRequest
from dynamo_frontend._tokens.text_api import DetokenizeRequest, TokenizeRequest

JSON = "application/json"
_REF = "#/components/schemas/{name}"
_BODIES: dict[str, tuple[type[msgspec.Struct], str, bool]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation", True),
    "/v1/completions": (CompletionRequest, "Continue a text", True),
    "/v1/responses": (ResponsesRequest, "Answer in the form of the responses API", True),
    "/v1/responses/input_tokens": (InputTokensRequest, "Count the tokens of a response's input", False),
    "/v1/messages": (MessagesRequest, "Answer in the form of the messages API", True),
    "/v1/messages/count_tokens": (CountTokensRequest, "Count the tokens of a message's input", False),
    "/v1/embeddings": (EmbeddingRequest, "Embed texts", False),
    "/v1/rerank": (RerankRequest, "Order documents by likeness to a query", False),
    "/tokenize": (TokenizeRequest, "Turn text into token ids", False),
    "/detokenize": (DetokenizeRequest, "Turn token ids into text", False),
    "/inference/v1/generate": (TokenRequest, "Generate token ids from token ids", True),
    "/v2/models/{model}/infer": (InferRequest, "Infer in the form of KServe", False),
    "/v2/models/{model}/generate": (GenerateBody, "Continue a text in the form of Triton", False),
    "/v2/models/{model}/generate_stream": (GenerateBody, "Continue a text in the form of Triton, streamed", True),
}
_READS = {
    "/v1/models": "List the models that can answer",
    "/v1/models/{model}": "Show one of them",
    "/v1/models/{model}/ready": "Whether a request for the model could be routed",
    "/v1/decisions/{id}": "Show why a request went where it went",
    "/v2": "Show the server in the form of KServe",
    "/v2/health/live": "Whether the process runs",
    "/v2/health/ready": "Whether a model can answer",
    "/v2/models/{model}": "Show a model's inputs and outputs",
    "/v2/models/{model}/ready": "Whether a model can answer",
    "/v2/models/{model}/config": "Show a model's configuration",
    "/health": "Whether the frontend takes requests",
    "/live": "Whether the process runs",
    "/ready": "Whether a request could be answered",
}
_PATH_PARAMETER = re.compile(r"\{(\w+)\}")
_ERROR_FORMS = {"/v1/messages": "MessagesError", "/v2": "KserveError"}
_READ_ERRORS = {"400": "The target is wrong", "404": "No such model or decision", "414": "The target is too long"}
_ERRORS = {
    "400": "The request is wrong; the message names the field",
    "404": "No such model",
    "408": "The request did not arrive in time",
    "413": "The body is too large",
    "415": "Content of a kind that the model does not take",
    "431": "The headers are too large",
    "500": "A defect of the server",
    "502": "A worker broke the contract",
    "503": "No worker can be reached",
    "504": "The time ran out",
    "529": "All workers are busy",
}


def openapi(request: HttpRequest, response: HttpResponse) -> None:
    """``GET /openapi.json``."""
    response.send(200, _document_bytes(), JSON)


@functools.cache
def _document_bytes() -> bytes:
    return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    kinds = [kind for kind, _, _ in _BODIES.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    posts = {
        path: {"post": _post(path, summary, schema, streams=streams)}
        for (path, (_, summary, streams)), schema in zip(_BODIES.items(), schemas, strict=True)
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Dynamo frontend", "version": metadata.version("dynamo-frontend")},
        "paths": {**posts, **{path: {"get": _get(path, summary)} for path, summary in _READS.items()}},
        "components": {"schemas": components, "responses": _error_responses()},
    }


def _post(path: str, summary: str, schema: Any, *, streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": {"type": "object"}}}
    if streams:
        # One event: its lines by name.
        word = {"type": "string"}
        fields = {"event": word, "id": word, "data": word}
        content["text/event-stream"] = {"schema": {"type": "object", "properties": fields, "required": ["data"]}}
    return {
        "summary": summary,
        "parameters": _parameters(path),
        "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
        "responses": {"200": {"description": "The answer", "content": content}, **_error_refs(path, _ERRORS)},
    }


def _get(path: str, summary: str) -> dict[str, Any]:
    content = {JSON: {"schema": {"type": "object"}}}
    answers = {
        "200": {"description": "Yes, or what was asked for", "content": content},
        "503": {"description": "No", "content": content},
    }
    if _PATH_PARAMETER.search(path):
        answers |= _error_refs(path, _READ_ERRORS)
    return {"summary": summary, "parameters": _parameters(path), "responses": answers}


def _parameters(path: str) -> list[dict[str, Any]]:
    schema = {"type": "string", "minLength": 1}
    return [{"name": name, "in": "path", "required": True, "schema": schema} for name in _PATH_PARAMETER.findall(path)]


def _error_refs(path: str, statuses: dict[str, str]) -> dict[str, Any]:
    kind = next((name for prefix, name in _ERROR_FORMS.items() if path.startswith(prefix)), "Error")
    return {status: {"$ref": f"#/components/responses/{kind}{status}"} for status in statuses}


def _error_responses() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    word = {"type": "string"}
    shapes = {
        "Error": _object({"error": _object({"message": word, "type": word, "param": text, "code": text})}),
        "MessagesError": _object({"type": {"const": "error"}, "error": _object({"type": word, "message": word})}),
        "KserveError": _object({"error": word}),
    }
    # What breaks the protocol or a limit of the server is refused before the API is known, in the first form.
    below = {kind: {"anyOf": [shape, shapes["Error"]]} for kind, shape in shapes.items()}
    return {
        f"{kind}{status}": {
            "description": meaning,
            "content": {JSON: {"schema": shape if kind == "Error" else below[kind]}},
        }
        for kind, shape in shapes.items()
        for status, meaning in (_ERRORS | _READ_ERRORS).items()
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)}
