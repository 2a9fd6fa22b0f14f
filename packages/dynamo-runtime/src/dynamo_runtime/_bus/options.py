"""Options of the event bus, and how a URL and a mapping become them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from dynamo_runtime._options import checked_options, merged_options, require_above_zero

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


DEFAULT_MAX_EVENT_BYTES = 32 << 20


class BusOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits and times of one bus.

    Attributes:
        broker: ``host:port`` of an event broker (``dynamo broker``) that events go through; empty sends them straight
            to subscribers. Replays go straight in either case.
        advertise: Host that subscribers reach this process under; needed if the detected one is not reachable.
        ring_events: Events that each publisher keeps for replay.
        ring_bytes: Payload bytes that each publisher keeps for replay.
        buffer_events: Events that a subscription may fall behind before it loses the oldest.
        max_event_bytes: Largest payload of an event; the same on both sides.
        max_snapshot_bytes: Largest state that a publisher gives to those who ask for it; the same on both sides.
        heartbeat_interval_s: Silence after which a publisher repeats its last sequence; doubles up to 64 times.
        join_timeout_s: Limit of waiting for the publishers that are there when subscribing.
        replay_timeout_s: Limit of a replay, and of taking a state.
    """

    broker: str = ""
    advertise: str = ""
    ring_events: int = 16384
    ring_bytes: int = 64 << 20
    buffer_events: int = 65536
    max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES
    max_snapshot_bytes: int = 16 << 20
    heartbeat_interval_s: float = 1.0
    join_timeout_s: float = 2.0
    replay_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        require_above_zero(self, (name for name in self.__struct_fields__ if name not in ("advertise", "broker")))


def bus_options(url: str, options: Mapping[str, object]) -> tuple[BusOptions, Metrics | None]:
    """Merge a URL's query with ``options``, which win; ``metrics`` among them is the registry scope to use.

    Raises:
        ConfigurationError: if an option is unknown or out of range.
    """
    fields, metrics = merged_options(url, options)
    return checked_options(BusOptions, fields, f"event bus {url}"), metrics
