"""Options of the event bus, and how a URL and a mapping become them."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import msgspec

from dynamo_core.errors import ConfigurationError

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
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name not in ("advertise", "broker") and value <= 0:
                raise ConfigurationError(f"{name} is {value}; give a number above 0", param=name)


def bus_options(url: str, options: Mapping[str, object]) -> tuple[BusOptions, Metrics | None]:
    """Merge a URL's query with ``options``, which win; ``metrics`` among them is the registry scope to use.

    Raises:
        ConfigurationError: if an option is unknown or out of range.
    """
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query, keep_blank_values=True))
    fields: dict[str, object] = {**query, **options}
    metrics = cast("Metrics | None", fields.pop("metrics", None))
    try:
        return msgspec.convert(fields, BusOptions, strict=False), metrics
    except msgspec.ValidationError as error:
        known = ", ".join((*BusOptions.__struct_fields__, "metrics"))
        raise ConfigurationError(f"event bus {url}: {error}; options are {known}") from error
