"""Whose id a request goes by, and the trace that it is part of."""

from __future__ import annotations

import random
import re

from dynamo_frontend._http.request import HttpRequest

_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_MAX_TRACE_STATE = 512
_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Ids must be unique, not secret; the system's own source of randomness costs a call into the kernel for each.
_random = random.Random(random.SystemRandom().getrandbits(256))


def request_id_of(request: HttpRequest) -> str:
    """Return the caller's request id if it is a plain one, else a new one."""
    given = request.header("x-request-id")
    return given if is_plain_id(given) else f"{_random.getrandbits(128):032x}"


def trace_of(request: HttpRequest) -> dict[str, str]:
    """Return the headers that make what workers do part of the caller's trace; empty if it has none.

    They are passed on as they came: this side opens no span of its own.
    """
    parent = request.headers.get("traceparent")
    if parent is None or _TRACE_PARENT.fullmatch(parent) is None:
        return {}
    state = request.header("tracestate")
    return {"traceparent": parent, **({"tracestate": state} if 0 < len(state) <= _MAX_TRACE_STATE else {})}


def is_plain_id(given: str) -> bool:
    """Return whether a caller's id is one that logs and other ids can carry."""
    return _PLAIN.fullmatch(given) is not None
