"""What travels on the bus: packets of events, and the questions and answers of a replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from dynamo_core.errors import BackendProtocolError
from dynamo_core.events import EventEnvelope

PACKET_BYTES = 64 << 10
"""A packet takes events up to this size; together with the high-water mark it bounds what a slow peer can pile up."""

MAX_QUESTION_BYTES = 64 << 10
"""Largest message that publishers take: a subscription or a question. Who sends more is disconnected."""

HIGH_WATER_PACKETS = 1000
ZMTP_HEARTBEAT_MS = 10_000
ZMTP_TIMEOUT_MS = 30_000
"""Silence after which a peer is asked for a sign of life, and after which it counts as lost."""

_ENVELOPE_BYTES = 40
"""What an event takes beside its texts and its payload."""

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding bytes of any kind may raise."""


class Packet(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive events of one publisher; without events a heartbeat.

    Attributes:
        publisher_id: Who published.
        last: The publisher's newest sequence, whether or not its event is in here.
        events: In order.
    """

    publisher_id: int
    last: int
    events: list[EventEnvelope] = []


class ReplayQuery(msgspec.Struct, frozen=True, array_like=True):
    """Asks a publisher for events ``first..last`` (None: the newest), or with ``snapshot`` for its state.

    A publisher that knows no snapshots answers with the events, so whoever asks for a state asks for none.
    """

    publisher_id: int
    first: int = 1
    last: int | None = 0
    snapshot: bool = False


class ReplayPart(msgspec.Struct, frozen=True, array_like=True):
    """Part of an answer; ``done`` marks the last, ``known`` says whether the publisher is there at all.

    A state comes as pieces in envelopes of one sequence.
    """

    events: list[EventEnvelope]
    done: bool
    known: bool = True


_encoder = msgspec.msgpack.Encoder()
_packet = msgspec.msgpack.Decoder(Packet)
_query = msgspec.msgpack.Decoder(ReplayQuery)
_part = msgspec.msgpack.Decoder(ReplayPart)


def encode(message: Packet | ReplayQuery | ReplayPart) -> bytes:
    """Return a message's bytes."""
    return _encoder.encode(message)


def decode_packet(payload: bytes) -> Packet:
    """Read a packet. Raises ``BackendProtocolError`` if it is none."""
    try:
        return _packet.decode(payload)
    except UNREADABLE as error:
        raise BackendProtocolError(f"event packet cannot be read: {error}") from error


def decode_query(payload: bytes) -> ReplayQuery:
    """Read a question. Raises ``BackendProtocolError`` if it is none."""
    try:
        return _query.decode(payload)
    except UNREADABLE as error:
        raise BackendProtocolError(f"replay query cannot be read: {error}") from error


def decode_part(payload: bytes) -> ReplayPart:
    """Read a part of an answer. Raises ``BackendProtocolError`` if it is none."""
    try:
        return _part.decode(payload)
    except UNREADABLE as error:
        raise BackendProtocolError(f"replay answer cannot be read: {error}") from error


def topic_frame(topic: str) -> bytes:
    """Return the first frame of a topic's messages; its end mark keeps one topic from being the prefix of another."""
    return topic.encode() + b"\0"


def portions(events: Iterable[EventEnvelope]) -> Iterator[list[EventEnvelope]]:
    """Cut events into lists that take about ``PACKET_BYTES`` each, at least one event each."""
    part: list[EventEnvelope] = []
    size = 0
    for event in events:
        event_bytes = len(event.payload) + len(event.topic) + len(event.schema) + _ENVELOPE_BYTES
        if part and size + event_bytes > PACKET_BYTES:
            yield part
            part, size = [], 0
        part.append(event)
        size += event_bytes
    if part:
        yield part
