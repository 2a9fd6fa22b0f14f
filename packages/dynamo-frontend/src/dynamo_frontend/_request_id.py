"""Whose id a request goes by."""

from __future__ import annotations

import re

from dynamo_core.ids import new_request_id
from dynamo_frontend._http.request import HttpRequest

_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id_of(request: HttpRequest) -> str:
    """Return the caller's request id if it is a plain one, else a new one."""
    given = request.header("x-request-id")
    return given if _PLAIN.fullmatch(given) else new_request_id()
