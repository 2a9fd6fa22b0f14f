"""``/openapi.json``, made from the very types that decode the requests."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

import msgspec

from dynamo_frontend._anthropic.fields import CountTokensRequest, MessagesRequest
from dynamo_frontend._embeddings.api import EmbeddingRequest
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
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
}
_READS = {
    "/v1/models": "List the models that can answer",
    "/health": "Whether the frontend takes requests",
    "/live": "Whether the process runs",
    "/ready": "Whether a request could be answered",
}
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
        path: {"post": _post(summary, schema, streams=streams)}
        for (path, (_, summary, streams)), schema in zip(_BODIES.items(), schemas, strict=True)
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Dynamo frontend", "version": metadata.version("dynamo-frontend")},
        "paths": {**posts, **{path: {"get": _get(summary)} for path, summary in _READS.items()}},
        "components": {"schemas": components, "responses": _error_responses()},
    }


def _post(summary: str, schema: Any, *, streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
        "responses": {"200": {"description": "The answer", "content": content}, **_error_refs(_ERRORS)},
    }


def _get(summary: str) -> dict[str, Any]:
    content = {JSON: {"schema": {"type": "object"}}}
    answers = {"200": {"description": "Yes, or the list", "content": content}}
    return {"summary": summary, "responses": {**answers, "503": {"description": "No", "content": content}}}


def _error_refs(statuses: dict[str, str]) -> dict[str, Any]:
    return {status: {"$ref": f"#/components/responses/Error{status}"} for status in statuses}


def _error_responses() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    shape = {"type": "object", "properties": {"error": {"type": "object", "properties": fields}}, "required": ["error"]}
    return {
        f"Error{status}": {"description": meaning, "content": {JSON: {"schema": shape}}}
        for status, meaning in _ERRORS.items()
    }
