"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from dynamo_core.errors import DynamoError, ErrorClass

_TYPES = {
    ErrorClass.INVALID_REQUEST: "invalid_request_error",
    ErrorClass.UNAUTHENTICATED: "authentication_error",
    ErrorClass.PERMISSION_DENIED: "permission_error",
    ErrorClass.NOT_FOUND: "invalid_request_error",
    ErrorClass.CONFLICT: "invalid_request_error",
    ErrorClass.PAYLOAD_TOO_LARGE: "invalid_request_error",
    ErrorClass.UNSUPPORTED_MEDIA: "invalid_request_error",
    ErrorClass.RATE_LIMITED: "rate_limit_error",
    ErrorClass.UNAVAILABLE: "service_unavailable_error",
    ErrorClass.CAPACITY_EXHAUSTED: "overloaded_error",
    ErrorClass.DEADLINE_EXCEEDED: "timeout_error",
    ErrorClass.NOT_IMPLEMENTED: "invalid_request_error",
}
_METRIC_TYPES = {
    ErrorClass.INVALID_REQUEST: "validation",
    ErrorClass.PAYLOAD_TOO_LARGE: "validation",
    ErrorClass.UNSUPPORTED_MEDIA: "validation",
    ErrorClass.NOT_FOUND: "not_found",
    ErrorClass.CAPACITY_EXHAUSTED: "overload",
    ErrorClass.RATE_LIMITED: "rate_limited",
    ErrorClass.UNAVAILABLE: "unavailable",
    ErrorClass.CANCELLED: "cancelled",
    ErrorClass.NOT_IMPLEMENTED: "not_implemented",
}
_JSON_STATUS_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_object(error: DynamoError) -> dict[str, Any]:
    """Return the error as its JSON object. The private diagnostic stays out."""
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.error_class, "server_error"),
            "param": error.param,
            "code": error.reason,
        }
    }


def error_body(error: DynamoError) -> bytes:
    """Return the error as JSON."""
    return msgspec.json.encode(error_object(error))


def status_body(status: int, message: str, *, code: str, param: str | None = None) -> bytes:
    """Return an error that arose below the application, such as an unknown path, as JSON."""
    kind = "server_error" if status >= 500 else _JSON_STATUS_TYPES.get(status, "invalid_request_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def http_status(error: DynamoError, overload_status: int = 529) -> int:
    """Return the status for an error."""
    if error.error_class is ErrorClass.CAPACITY_EXHAUSTED:
        return overload_status
    return error.http_status


def error_headers(error: DynamoError) -> dict[str, str]:
    """Return headers that belong to an error: how to say who one is, or when to come again if that is known."""
    if error.error_class is ErrorClass.UNAUTHENTICATED:
        return {"www-authenticate": "Bearer"}
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def metric_error_type(error: DynamoError) -> str:
    """Return the value of the metric label ``error_type``."""
    return _METRIC_TYPES.get(error.error_class, "internal")
