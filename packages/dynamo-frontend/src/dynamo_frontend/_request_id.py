"""Whose id a request goes by."""

from __future__ import annotations

import random
import re

from dynamo_frontend._http.request import HttpRequest

_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Ids must be unique, not secret; the system's own source of randomness costs a call into the kernel for each.
_random = random.Random(random.SystemRandom().getrandbits(256))


def request_id_of(request: HttpRequest) -> str:
    """Return the caller's request id if it is a plain one, else a new one."""
    given = request.header("x-request-id")
    return given if is_plain_id(given) else f"{_random.getrandbits(128):032x}"


def is_plain_id(given: str) -> bool:
    """Return whether a caller's id is one that logs and other ids can carry."""
    return _PLAIN.fullmatch(given) is not None
