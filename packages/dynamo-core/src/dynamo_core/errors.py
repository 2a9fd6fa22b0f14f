"""The error tree of the whole stack, and how each error behaves at the edges.

::

    DynamoError
    ├── InvalidRequestError        400  invalid_request
    ├── UnauthenticatedError       401  unauthenticated
    ├── PermissionDeniedError      403  permission_denied
    ├── NotFoundError              404  not_found
    ├── ConflictError              409  conflict
    ├── PayloadTooLargeError       413  payload_too_large
    ├── UnsupportedMediaError      415  unsupported_media
    ├── RateLimitedError           429  rate_limited
    ├── CancelledRequestError      499  cancelled          (nothing is delivered: the client left)
    ├── InternalError              500  internal
    ├── UnsupportedOperationError  501  not_implemented
    ├── BackendProtocolError       502  backend_protocol
    ├── UnavailableError           503  unavailable        (no path to a worker)
    ├── DeadlineExceededError      504  deadline_exceeded
    ├── CapacityExhaustedError     529  capacity_exhausted (workers exist, all are busy)
    └── ConfigurationError         (never on the wire: a process that is set up wrongly exits with status 2)

A class says who is at fault and which HTTP status fits; the reason says what happened; retry and migration rules
follow from the reason, so that a client of any package decides alike.
"""

from __future__ import annotations

import enum
import re
from typing import ClassVar

import msgspec

MAX_DIAGNOSTIC_BYTES = 4096
MAX_CAUSES = 8
_REASON = re.compile(r"[a-z0-9._-]{1,128}")


class ErrorClass(enum.Enum):
    """Kind of a failure as it travels between processes."""

    INVALID_REQUEST = "invalid_request"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNSUPPORTED_MEDIA = "unsupported_media"
    RATE_LIMITED = "rate_limited"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    NOT_IMPLEMENTED = "not_implemented"
    BACKEND_PROTOCOL = "backend_protocol"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CAPACITY_EXHAUSTED = "capacity_exhausted"
    CONFIGURATION = "configuration"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> ErrorClass:
        return cls.UNKNOWN


MIGRATABLE_REASONS = frozenset(
    {
        "transport.cannot_connect",
        "transport.disconnected",
        "transport.connection_timeout",
        "backend.cannot_connect",
        "backend.disconnected",
        "backend.connection_timeout",
        "backend.engine_shutdown",
        "backend.worker_unavailable",
        "backend.draining",
        "backend.stream_incomplete",
        "capacity.worker_overloaded",
    }
)
"""Reasons after which another worker may continue the same request."""

NEVER_MIGRATED_REASONS = frozenset({"request.cancelled", "backend.cancelled", "capacity.pool_exhausted"})
"""Reasons that forbid migration wherever they stand in a cause chain."""


class ErrorRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One error as data: what crosses the wire, with its causes."""

    error_class: str
    reason: str
    message: str
    diagnostic: str = ""
    retry_after_s: float | None = None
    param: str | None = None
    causes: tuple[ErrorRecord, ...] = ()


class DynamoError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: What the caller may read: the field, the value and the remedy.
        reason: Dotted machine-readable reason; the class's default if omitted.
        diagnostic: Private detail for logs; cut to 4096 bytes on the wire and never shown to API clients.
        param: Name of the offending request field, if there is one.
        retry_after_s: Seconds after which a retry is worthwhile, if known.
    """

    error_class: ClassVar[ErrorClass] = ErrorClass.INTERNAL
    http_status: ClassVar[int] = 500
    default_reason: ClassVar[str] = "runtime.internal"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        diagnostic: str = "",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.diagnostic = diagnostic
        self.param = param
        self.retry_after_s = retry_after_s
        if not _REASON.fullmatch(self.reason):
            self.diagnostic = f"invalid reason {self.reason!r}; {diagnostic}"
            self.reason = "runtime.invalid_error"

    @property
    def migratable(self) -> bool:
        """Whether another worker may continue the request that met this error."""
        reasons = {error.reason for error in self.chain() if isinstance(error, DynamoError)}
        if reasons & NEVER_MIGRATED_REASONS:
            return False
        return self.reason in MIGRATABLE_REASONS

    def chain(self) -> list[BaseException]:
        """This error followed by its causes, nearest first, at most ``MAX_CAUSES`` long."""
        found: list[BaseException] = [self]
        cause = self.__cause__
        while cause is not None and cause not in found and len(found) < MAX_CAUSES:
            found.append(cause)
            cause = cause.__cause__
        return found

    def to_record(self) -> ErrorRecord:
        """Return the error and its cause chain as wire data."""
        causes = tuple(_record_of(error) for error in self.chain()[1:])
        return _record_of(self, causes)


class InvalidRequestError(DynamoError):
    """The request itself is wrong; sending it again cannot help."""

    error_class = ErrorClass.INVALID_REQUEST
    http_status = 400
    default_reason = "request.invalid_argument"


class UnauthenticatedError(DynamoError):
    """No valid credential came with the request."""

    error_class = ErrorClass.UNAUTHENTICATED
    http_status = 401
    default_reason = "request.unauthenticated"


class PermissionDeniedError(DynamoError):
    """The credential is valid but does not allow this."""

    error_class = ErrorClass.PERMISSION_DENIED
    http_status = 403
    default_reason = "request.permission_denied"


class NotFoundError(DynamoError):
    """The named model, endpoint or object does not exist."""

    error_class = ErrorClass.NOT_FOUND
    http_status = 404
    default_reason = "request.not_found"


class ConflictError(DynamoError):
    """The request contradicts the present state, for example a lost compare-and-set."""

    error_class = ErrorClass.CONFLICT
    http_status = 409
    default_reason = "request.conflict"


class PayloadTooLargeError(DynamoError):
    """A body or frame exceeds the stated limit."""

    error_class = ErrorClass.PAYLOAD_TOO_LARGE
    http_status = 413
    default_reason = "request.payload_too_large"


class UnsupportedMediaError(DynamoError):
    """A content part has a type that the model does not take."""

    error_class = ErrorClass.UNSUPPORTED_MEDIA
    http_status = 415
    default_reason = "request.unsupported_media"


class RateLimitedError(DynamoError):
    """A per-key limit is used up."""

    error_class = ErrorClass.RATE_LIMITED
    http_status = 429
    default_reason = "request.rate_limited"
    retryable = True


class CancelledRequestError(DynamoError):
    """The caller gave up; nothing is delivered."""

    error_class = ErrorClass.CANCELLED
    http_status = 499
    default_reason = "request.cancelled"


class InternalError(DynamoError):
    """A defect on our side."""

    error_class = ErrorClass.INTERNAL
    http_status = 500
    default_reason = "runtime.internal"


class UnsupportedOperationError(DynamoError):
    """The feature exists in the contract but not in this implementation."""

    error_class = ErrorClass.NOT_IMPLEMENTED
    http_status = 501
    default_reason = "runtime.not_implemented"


class BackendProtocolError(DynamoError):
    """A worker answered in a way that breaks the contract."""

    error_class = ErrorClass.BACKEND_PROTOCOL
    http_status = 502
    default_reason = "backend.protocol"


class UnavailableError(DynamoError):
    """No usable path to a worker exists at this moment."""

    error_class = ErrorClass.UNAVAILABLE
    http_status = 503
    default_reason = "backend.unavailable"
    retryable = True


class DeadlineExceededError(DynamoError):
    """The request's time ran out."""

    error_class = ErrorClass.DEADLINE_EXCEEDED
    http_status = 504
    default_reason = "request.deadline_exceeded"


class CapacityExhaustedError(DynamoError):
    """Workers exist and are all busy."""

    error_class = ErrorClass.CAPACITY_EXHAUSTED
    http_status = 529
    default_reason = "capacity.exhausted"
    retryable = True


class ConfigurationError(DynamoError):
    """The process is set up wrongly; commands print the message and exit with status 2."""

    error_class = ErrorClass.CONFIGURATION
    http_status = 500
    default_reason = "configuration.invalid"


ERROR_TYPES: dict[ErrorClass, type[DynamoError]] = {
    kind.error_class: kind
    for kind in (
        InvalidRequestError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        ConflictError,
        PayloadTooLargeError,
        UnsupportedMediaError,
        RateLimitedError,
        CancelledRequestError,
        InternalError,
        UnsupportedOperationError,
        BackendProtocolError,
        UnavailableError,
        DeadlineExceededError,
        CapacityExhaustedError,
        ConfigurationError,
    )
}
"""The exception type of each error class."""


def error_from_record(record: ErrorRecord) -> DynamoError:
    """Rebuild the exception, cause chain included, that ``DynamoError.to_record`` described.

    A class this release does not know becomes ``InternalError`` with its reason kept.
    """
    error = _bare_error(record)
    last: BaseException = error
    for cause in record.causes[:MAX_CAUSES]:
        last.__cause__ = _bare_error(cause)
        last = last.__cause__
    return error


def as_dynamo_error(error: BaseException) -> DynamoError:
    """Return ``error`` itself if it is typed, else an ``InternalError`` that wraps it."""
    if isinstance(error, DynamoError):
        return error
    wrapped = InternalError(
        "The server met an unexpected condition.",
        reason="runtime.unclassified",
        diagnostic=f"{type(error).__name__}: {error}",
    )
    wrapped.__cause__ = error
    return wrapped


def _bare_error(record: ErrorRecord) -> DynamoError:
    kind = ERROR_TYPES.get(ErrorClass(record.error_class), InternalError)
    return kind(
        record.message,
        reason=record.reason,
        diagnostic=record.diagnostic,
        param=record.param,
        retry_after_s=record.retry_after_s,
    )


def _record_of(error: BaseException, causes: tuple[ErrorRecord, ...] = ()) -> ErrorRecord:
    if not isinstance(error, DynamoError):
        text = f"{type(error).__name__}: {error}"
        return ErrorRecord(
            ErrorClass.INTERNAL.value, "runtime.unclassified", type(error).__name__, diagnostic=_cut(text)
        )
    return ErrorRecord(
        error_class=error.error_class.value,
        reason=error.reason,
        message=_encodable(error.message),
        diagnostic=_cut(error.diagnostic),
        retry_after_s=error.retry_after_s,
        param=None if error.param is None else _encodable(error.param),
        causes=causes,
    )


def _encodable(text: str) -> str:
    # Text from a client may hold lone surrogates, which no encoder takes; an error about it must still travel.
    return text.encode("utf-8", "replace").decode("utf-8")


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:MAX_DIAGNOSTIC_BYTES].decode("utf-8", "ignore")
