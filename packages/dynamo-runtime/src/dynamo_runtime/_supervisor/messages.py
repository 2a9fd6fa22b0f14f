"""What travels to and from a supervisor's endpoints, as msgpack or, if the caller wrote JSON, as JSON."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import EndpointId
from dynamo_core.planning import PoolState

T = TypeVar("T")

COMPONENT = "supervisor"


class ScaleRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks for replica counts by role."""

    replicas: dict[str, int] = {}
    decision_id: int = 0


class SupervisorState(msgspec.Struct, frozen=True):
    """The pools of a supervisor by role."""

    pools: dict[str, PoolState] = {}


def scale_endpoint(namespace: str) -> EndpointId:
    """Return the endpoint that takes a ``ScaleRequest`` and answers a ``SupervisorState``."""
    return EndpointId(namespace, COMPONENT, "scale")


def state_endpoint(namespace: str) -> EndpointId:
    """Return the endpoint that answers a ``SupervisorState`` to any payload."""
    return EndpointId(namespace, COMPONENT, "state")


def is_json(payload: bytes) -> bool:
    """Whether a payload is a JSON object; no msgpack map begins like one."""
    return payload.lstrip()[:1] == b"{"


def decode_message(payload: bytes, kind: type[T]) -> T:
    """Read JSON or msgpack.

    Raises:
        InvalidRequestError: if the bytes are neither, or not of that type.
    """
    decode = msgspec.json.decode if is_json(payload) else msgspec.msgpack.decode
    try:
        return decode(payload, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"payload is no {kind.__name__}: {error}") from error


def encode_like(payload: bytes, message: msgspec.Struct) -> bytes:
    """Encode an answer in the form its request had."""
    return msgspec.json.encode(message) if is_json(payload) else msgspec.msgpack.encode(message)
