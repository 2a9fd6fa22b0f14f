"""What a worker says of itself to operators."""

from __future__ import annotations

from typing import Any

from dynamo_core.component import Health
from dynamo_core.enums import HealthState
from dynamo_core.ids import InstanceId, format_instance_id

_STATES = {HealthState.READY: "serving", HealthState.STOPPED: "stopping"}


def worker_status(
    instance_id: InstanceId, health: Health, *, running: int, registered: bool, transfers: int | None
) -> dict[str, Any]:
    """Return state, requests in flight, and whether the process may go.

    Args:
        instance_id: Whose.
        health: Its line on the health board.
        running: Requests being served.
        registered: Whether it is in discovery.
        transfers: Hand-offs of KV that others may still fetch; None in a role that has none.
    """
    state = _STATES.get(health.state, health.state.value)
    if state == "draining" and not running:
        state = "drained"
    return {
        "state": state,
        "reason": health.reason,
        "instance_id": format_instance_id(instance_id),
        "inflight_requests": running,
        "kv_transfers": "not_applicable" if transfers is None else transfers,
        "safe_to_delete": not running and not registered and not transfers,
        "discovery_registered": registered,
    }
