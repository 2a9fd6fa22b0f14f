"""The wire codec: msgpack through msgspec, with rules that let release N and N-1 read each other.

* Fields have defaults; unknown fields are ignored; unknown enum values become ``UNKNOWN``.
* Map-encoded types may gain fields anywhere; array-encoded ones only at their end.
* Each type has a schema name ``dynamo.<type>.v1`` that its envelope carries.
"""

from __future__ import annotations

from typing import Any, Generic, TypeAlias, TypeVar, cast

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.discovery import EventChannel, Instance, ModelRecord
from dynamo_core.errors import BackendProtocolError, ErrorRecord
from dynamo_core.events import (
    BlockRemoved,
    BlocksCleared,
    BlockStored,
    EventEnvelope,
    KvEvent,
    KvEventBatch,
    KvEventQuery,
    UnknownKvEvent,
)
from dynamo_core.ids import WorkerId
from dynamo_core.kv import TransferRequest
from dynamo_core.load import ForwardPassMetrics, WorkerLoad
from dynamo_core.planning import Observation, ScalingDecision, TrafficStats
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.routing import RequestOutcome, RoutingDecision, RoutingRequest
from dynamo_core.tokens import XXH3_1337_V1

T = TypeVar("T")
Payload: TypeAlias = bytes | bytearray | memoryview
"""What a decoder reads."""


class Codec(Generic[T]):
    """Encoder and decoder of one wire type.

    Args:
        kind: The type; a msgspec Struct.
        schema: Its schema name.
    """

    def __init__(self, kind: type[T], schema: str) -> None:
        self.kind = kind
        self.schema = schema
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(kind)

    def encode(self, value: T) -> bytes:
        """Return the value as msgpack."""
        return self._encoder.encode(value)

    def decode(self, payload: Payload) -> T:
        """Read msgpack.

        Raises:
            BackendProtocolError: if the bytes are no value of this type.
        """
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BackendProtocolError(f"payload is not {self.schema}: {error}", reason="backend.protocol") from error


class KvEventBatchCodec(Codec[KvEventBatch]):
    """Codec of KV event batches; an event of an unknown kind becomes ``UnknownKvEvent``."""

    def decode(self, payload: Payload) -> KvEventBatch:
        """Read a batch, falling back to event-by-event decoding if one is of an unknown kind."""
        try:
            return self._decoder.decode(payload)
        except msgspec.ValidationError:
            return self._decode_each(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BackendProtocolError(f"payload is not {self.schema}: {error}") from error

    def _decode_each(self, payload: Payload) -> KvEventBatch:
        try:
            raw = msgspec.msgpack.decode(payload, type=_RawBatch)
            events = tuple(_decode_event(item) for item in raw.events)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BackendProtocolError(f"payload is not {self.schema}: {error}") from error
        return KvEventBatch(raw.worker, events, raw.block_size, raw.algorithm, raw.timestamp_s, raw.full_dump)


class _RawBatch(msgspec.Struct):
    worker: WorkerId
    events: tuple[msgspec.Raw, ...] = ()
    block_size: int = 0
    algorithm: str = XXH3_1337_V1
    timestamp_s: float = 0.0
    full_dump: bool = False


class _EventHead(msgspec.Struct):
    type: str
    event_id: int


_EVENT_TAGS = frozenset({"stored", "removed", "cleared", "unknown"})


def _decode_event(raw: msgspec.Raw) -> KvEvent:
    head = msgspec.msgpack.decode(raw, type=_EventHead)
    if head.type not in _EVENT_TAGS:
        return UnknownKvEvent(head.event_id, head.type)
    kind = BlockStored | BlockRemoved | BlocksCleared | UnknownKvEvent
    return cast("KvEvent", msgspec.msgpack.decode(raw, type=kind))


GENERATE_REQUEST = Codec(GenerateRequest, "dynamo.generate_request.v1")
GENERATE_CHUNK = Codec(GenerateChunk, "dynamo.generate_chunk.v1")
KV_EVENT_BATCH = KvEventBatchCodec(KvEventBatch, "dynamo.kv_event_batch.v1")
KV_EVENT_QUERY = Codec(KvEventQuery, "dynamo.kv_event_query.v1")
EVENT_ENVELOPE = Codec(EventEnvelope, "dynamo.event_envelope.v1")
ERROR_RECORD = Codec(ErrorRecord, "dynamo.error.v1")
WORKER_LOAD = Codec(WorkerLoad, "dynamo.worker_load.v1")
FORWARD_PASS_METRICS = Codec(ForwardPassMetrics, "dynamo.forward_pass_metrics.v1")
MODEL_CARD = Codec(ModelCard, "dynamo.model_card.v1")
INSTANCE = Codec(Instance, "dynamo.instance.v1")
MODEL_RECORD = Codec(ModelRecord, "dynamo.model_record.v1")
EVENT_CHANNEL = Codec(EventChannel, "dynamo.event_channel.v1")
ROUTING_REQUEST = Codec(RoutingRequest, "dynamo.routing_request.v1")
ROUTING_DECISION = Codec(RoutingDecision, "dynamo.routing_decision.v1")
REQUEST_OUTCOME = Codec(RequestOutcome, "dynamo.request_outcome.v1")
TRAFFIC_STATS = Codec(TrafficStats, "dynamo.traffic_stats.v1")
OBSERVATION = Codec(Observation, "dynamo.observation.v1")
SCALING_DECISION = Codec(ScalingDecision, "dynamo.scaling_decision.v1")
TRANSFER_REQUEST = Codec(TransferRequest, "dynamo.transfer_request.v1")

CODECS: dict[str, Codec[Any]] = {
    codec.schema: codec
    for codec in (
        GENERATE_REQUEST,
        GENERATE_CHUNK,
        KV_EVENT_BATCH,
        KV_EVENT_QUERY,
        EVENT_ENVELOPE,
        ERROR_RECORD,
        WORKER_LOAD,
        FORWARD_PASS_METRICS,
        MODEL_CARD,
        INSTANCE,
        MODEL_RECORD,
        EVENT_CHANNEL,
        ROUTING_REQUEST,
        ROUTING_DECISION,
        REQUEST_OUTCOME,
        TRAFFIC_STATS,
        OBSERVATION,
        SCALING_DECISION,
        TRANSFER_REQUEST,
    )
}
"""Every wire type by schema name."""
