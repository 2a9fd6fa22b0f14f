"""Identities: who is who on every plane.

All of them are small values that print the same way in logs, keys and metric labels.
"""

from __future__ import annotations

import re
import secrets
from typing import NewType

import msgspec

from dynamo_core.errors import InvalidRequestError

RequestId = NewType("RequestId", str)
"""One client request, over all its attempts."""

ModelName = NewType("ModelName", str)
"""The name a client uses for a model."""

ReservationId = NewType("ReservationId", str)
"""A router's booking of load for one request on one worker."""

DecisionId = NewType("DecisionId", str)
"""A routing receipt."""

InstanceId = NewType("InstanceId", int)
"""One live process's endpoint: unique, 53 bits so that JSON readers keep it exact, printed as hex."""

PublisherId = NewType("PublisherId", int)
"""One publisher on the event bus. Unique per publisher, not per process."""

BlockHash = NewType("BlockHash", int)
"""An unsigned 64-bit block hash; which kind, the field's name says."""

MAX_INSTANCE_ID = (1 << 53) - 1
_HEX = re.compile(r"[0-9A-Fa-f]{1,14}")
_SEGMENT = re.compile(r"[A-Za-z0-9_-]{1,128}")


class EndpointId(msgspec.Struct, frozen=True, order=True):
    """Address of one kind of endpoint: ``namespace.component.endpoint``."""

    namespace: str
    component: str
    endpoint: str

    @classmethod
    def parse(cls, text: str) -> EndpointId:
        """Read ``[dyn://]namespace.component.endpoint``.

        Raises:
            InvalidRequestError: if there are not exactly three parts of letters, digits, dash or underscore.
        """
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3 or not all(_SEGMENT.fullmatch(part) for part in parts):
            raise InvalidRequestError(
                f"endpoint {text!r} is not namespace.component.endpoint; "
                "give three parts of letters, digits, '-' or '_', for example dynamo.backend.generate",
                param="endpoint",
            )
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"


class WorkerId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """The unit of routing: an instance and one of its data-parallel ranks."""

    instance_id: int
    dp_rank: int = 0

    def __str__(self) -> str:
        return f"{format_instance_id(InstanceId(self.instance_id))}/{self.dp_rank}"


def new_instance_id() -> InstanceId:
    """Return a random instance id in ``1..2**53-1``."""
    return InstanceId(secrets.randbelow(MAX_INSTANCE_ID) + 1)


def new_publisher_id() -> PublisherId:
    """Return a random publisher id in ``1..2**53-1``."""
    return PublisherId(secrets.randbelow(MAX_INSTANCE_ID) + 1)


def new_request_id() -> RequestId:
    """Return a random request id of 32 hex digits."""
    return RequestId(secrets.token_hex(16))


def format_instance_id(instance_id: InstanceId) -> str:
    """Return the id as lower-case hex, its form in keys, labels, headers and logs."""
    return format(instance_id, "x")


def parse_instance_id(text: str) -> InstanceId:
    """Read the hex form.

    Raises:
        InvalidRequestError: if it is not hex or exceeds 53 bits.
    """
    value = int(text, 16) if _HEX.fullmatch(text) else MAX_INSTANCE_ID + 1
    if value > MAX_INSTANCE_ID:
        raise InvalidRequestError(f"instance id {text!r} is not a hex number of at most 53 bits", param="instance_id")
    return InstanceId(value)
