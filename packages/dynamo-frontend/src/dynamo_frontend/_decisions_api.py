"""Why a request went where it went: the receipts that the routers of this process keep."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterable

import msgspec

from dynamo_core.errors import NotFoundError
from dynamo_core.routing import Router, SupportsReceipts
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse

JSON = "application/json"
DECISIONS_PREFIX = "/v1/decisions/"


class DecisionsApi:
    """Shows routing decisions by the id that every answer carries in ``x-dynamo-decision-id``.

    Args:
        routers: Returns the routers whose decisions can be asked for.
    """

    def __init__(self, routers: Callable[[], Iterable[Router]]) -> None:
        self._routers = routers

    def decision(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v1/decisions/{id}``: the decision, and its outcome once the request is over.

        Raises:
            NotFoundError: if no router of this process keeps it.
        """
        identity = urllib.parse.unquote(request.path[len(DECISIONS_PREFIX) :])
        keepers = [router for router in self._routers() if isinstance(router, SupportsReceipts)]
        for router in keepers:
            found = router.decision(identity)
            if found is not None:
                decision, outcome = found
                response.send(200, msgspec.json.encode({"decision": decision, "outcome": outcome}), JSON)
                return
        raise NotFoundError(_not_kept(identity, bool(keepers)), reason="request.unknown_decision", param="id")


def _not_kept(identity: str, has_keepers: bool) -> str:
    if not has_keepers:
        return f"Decision '{identity}' is not kept: the router in use keeps no decisions; choose another with --router."
    return (
        f"Decision '{identity}' is unknown or no longer kept. Ids are in the x-dynamo-decision-id header; each "
        "frontend process keeps its own newest decisions."
    )
