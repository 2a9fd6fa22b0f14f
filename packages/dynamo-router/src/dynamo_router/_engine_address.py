"""Where a bare engine's KV events are heard, as an instance in discovery names it.

``Instance.metadata`` of a worker whose engine publishes by itself has these keys, all of them text:

``kv_events_endpoint``
    Where the first dp rank of the instance publishes (``tcp://10.0.0.7:5557``); further ranks count up from its port.
``kv_events_replay_endpoint``
    Its replay socket, counted in the same way; absent if it has none.
``kv_events_dialect``
    ``vllm`` or ``sglang``; both are read by what they send, so it may be absent.
``kv_events_topic``
    Topic to subscribe to; absent for all.
``dp_size``
    How many dp ranks the instance has; absent for what its card says.
"""

from __future__ import annotations

import re

import msgspec

from dynamo_core.discovery import Instance
from dynamo_core.errors import InvalidRequestError

KV_EVENTS_ENDPOINT = "kv_events_endpoint"
KV_EVENTS_REPLAY_ENDPOINT = "kv_events_replay_endpoint"
KV_EVENTS_DIALECT = "kv_events_dialect"
KV_EVENTS_TOPIC = "kv_events_topic"
DP_SIZE = "dp_size"
MAX_DP_SIZE = 1024
DIALECTS = ("vllm", "sglang")
_TCP_PORT = re.compile(r"^(tcp://.+:)(\d+)$")


class EngineAddress(msgspec.Struct, frozen=True):
    """Where the dp ranks of one worker publish.

    Attributes:
        worker_id: The instance.
        endpoints: Publishing socket by dp rank.
        replay_endpoints: Replay socket by dp rank; ranks without one are absent.
        topic: Topic to subscribe to; empty for all.
    """

    worker_id: int
    endpoints: dict[int, str]
    replay_endpoints: dict[int, str] = {}
    topic: str = ""


def read_dp_size(instance: Instance) -> int | None:
    """Return how many dp ranks an instance says it has; None if it says nothing.

    Raises:
        InvalidRequestError: if that is no number of ranks.
    """
    text = instance.metadata.get(DP_SIZE)
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MAX_DP_SIZE:
        raise InvalidRequestError(
            f"metadata {DP_SIZE} of instance {instance.instance_id:x} is {text!r}; give 1 to {MAX_DP_SIZE}",
            param=f"metadata.{DP_SIZE}",
        )
    return int(text)


def read_engine_address(instance: Instance, ranks: range) -> EngineAddress | None:
    """Return where the engine behind an instance publishes, or None if it names no endpoint.

    Args:
        instance: As it stands in discovery.
        ranks: Its dp ranks.

    Raises:
        InvalidRequestError: for an unknown dialect, or an address without a port to count ranks from.
    """
    endpoint = instance.metadata.get(KV_EVENTS_ENDPOINT, "")
    if not endpoint:
        return None
    dialect = instance.metadata.get(KV_EVENTS_DIALECT, "")
    if dialect and dialect not in DIALECTS:
        raise InvalidRequestError(
            f"metadata {KV_EVENTS_DIALECT} of instance {instance.instance_id:x} is {dialect!r}; "
            f"give {' or '.join(DIALECTS)}, or leave it out",
            param=f"metadata.{KV_EVENTS_DIALECT}",
        )
    replay = instance.metadata.get(KV_EVENTS_REPLAY_ENDPOINT, "")
    return EngineAddress(
        instance.instance_id,
        {rank: rank_endpoint(endpoint, rank - ranks.start) for rank in ranks},
        {rank: rank_endpoint(replay, rank - ranks.start) for rank in ranks if replay},
        instance.metadata.get(KV_EVENTS_TOPIC, ""),
    )


def rank_endpoint(endpoint: str, rank: int) -> str:
    """Return the address of a dp rank, which engines offset by the port.

    Raises:
        InvalidRequestError: if a rank above 0 is asked of an address without a port.
    """
    if not rank or not endpoint:
        return endpoint
    found = _TCP_PORT.match(endpoint)
    if found is None:
        raise InvalidRequestError(
            f"endpoint {endpoint!r} has no port to count dp ranks from; give tcp://HOST:PORT", param="endpoint"
        )
    return f"{found[1]}{int(found[2]) + rank}"
