"""The compatibility rules of the wire: newer peers are read, broken ones are refused."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core import wire
from dynamo_core.cards import ModelCard
from dynamo_core.enums import FinishReason, Modality, ModelType, Tier, WireEnum
from dynamo_core.errors import BackendProtocolError
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, EventEnvelope, KvEventBatch, UnknownKvEvent
from dynamo_core.ids import WorkerId
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.testing.golden._examples import EXAMPLES
from dynamo_core.tokens import pack_hashes, pack_tokens


def _add_everywhere(value: Any) -> Any:
    """Add an unknown field to every map, as a newer release may."""
    if isinstance(value, dict):
        return {key: _add_everywhere(item) for key, item in value.items()} | {"field_of_the_future": [1, {"x": 2}]}
    return [_add_everywhere(item) for item in value] if isinstance(value, list) else value


def _is_open_map(schema: str) -> bool:
    return not isinstance(msgspec.msgpack.decode(wire.CODECS[schema].encode(EXAMPLES[schema])), list)


@pytest.mark.parametrize("schema", [schema for schema in wire.CODECS if _is_open_map(schema)])
def test_unknown_fields_are_ignored(schema: str) -> None:
    codec = wire.CODECS[schema]
    raw = msgspec.msgpack.decode(codec.encode(EXAMPLES[schema]))
    raw["field_of_the_future"] = {"deep": [1, 2]}
    assert codec.decode(msgspec.msgpack.encode(raw)) == EXAMPLES[schema]


def test_unknown_fields_of_inner_types_are_ignored() -> None:
    card = ModelCard("m", eos_token_ids=(2,))
    raw = _add_everywhere(msgspec.msgpack.decode(wire.MODEL_CARD.encode(card)))
    raw["runtime_config"] = {"field_of_the_future": 1}
    assert wire.MODEL_CARD.decode(msgspec.msgpack.encode(raw)) == card


@pytest.mark.parametrize("schema", ["dynamo.generate_chunk.v1", "dynamo.event_envelope.v1"])
def test_arrays_may_grow_at_their_end(schema: str) -> None:
    codec = wire.CODECS[schema]
    raw = msgspec.msgpack.decode(codec.encode(EXAMPLES[schema]))
    assert codec.decode(msgspec.msgpack.encode([*raw, "future", 1])) == EXAMPLES[schema]


def test_missing_trailing_fields_of_arrays_have_their_defaults() -> None:
    assert wire.GENERATE_CHUNK.decode(msgspec.msgpack.encode([])) == GenerateChunk()
    assert wire.GENERATE_CHUNK.decode(msgspec.msgpack.encode([pack_tokens((1,)), 5])) == GenerateChunk(
        pack_tokens((1,)), 5
    )
    envelope = wire.EVENT_ENVELOPE.decode(msgspec.msgpack.encode(["t", 1, 2, b"x"]))
    assert envelope == EventEnvelope("t", 1, 2, b"x")
    usage = msgspec.msgpack.decode(msgspec.msgpack.encode([3, 4]), type=Usage)
    assert (usage.total_tokens, usage.cached_tokens) == (7, 0)


@pytest.mark.parametrize("schema", wire.CODECS)
def test_only_identity_fields_are_required(schema: str) -> None:
    codec = wire.CODECS[schema]
    required = [f.encode_name for f in msgspec.structs.fields(codec.kind) if f.required]
    raw = msgspec.msgpack.decode(codec.encode(EXAMPLES[schema]))
    if isinstance(raw, list):
        bare: Any = raw[: len(required)]
    else:
        bare = {name: raw[name] for name in required}
    assert isinstance(codec.decode(msgspec.msgpack.encode(bare)), codec.kind)


@pytest.mark.parametrize("kind", WireEnum.__subclasses__())
def test_every_enum_has_an_unknown_member(kind: type[WireEnum]) -> None:
    assert kind("a value of the future") is kind["UNKNOWN"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode("a value of the future"), type=kind) is kind["UNKNOWN"]


def test_unknown_enum_values_decode_inside_records() -> None:
    raw = {"request_id": "r", "model": "m", "modality": "smell"}
    assert wire.GENERATE_REQUEST.decode(msgspec.msgpack.encode(raw)).modality is Modality.UNKNOWN
    card = wire.MODEL_CARD.decode(msgspec.msgpack.encode({"name": "m", "model_types": ["chat", "telepathy"]}))
    assert card.model_types == (ModelType.CHAT, ModelType.UNKNOWN)
    chunk = wire.GENERATE_CHUNK.decode(msgspec.msgpack.encode([b"", 0, 0, 0, "bored"]))
    assert chunk.finish_reason is FinishReason.UNKNOWN


def test_unknown_kv_event_moves_the_sequence_on() -> None:
    raw = {
        "worker": [7, 1],
        "events": [
            {"type": "removed", "event_id": 1, "engine_hashes": pack_hashes((5,))},
            {"type": "frozen", "event_id": 2, "engine_hashes": pack_hashes((5,)), "until": 9},
            {"type": "cleared", "event_id": 3, "tier": "tape"},
        ],
        "block_size": 16,
        "timestamp_s": 2.5,
        "full_dump": True,
        "field_of_the_future": 1,
    }
    batch = wire.KV_EVENT_BATCH.decode(msgspec.msgpack.encode(raw))
    assert batch == KvEventBatch(
        WorkerId(7, 1),
        (BlockRemoved(1, pack_hashes((5,))), UnknownKvEvent(2, "frozen"), BlocksCleared(3, Tier.UNKNOWN)),
        block_size=16,
        timestamp_s=2.5,
        full_dump=True,
    )


def test_unknown_kv_event_keeps_the_default_algorithm() -> None:
    raw = {"worker": [7], "events": [{"type": "frozen", "event_id": 2}]}
    batch = wire.KV_EVENT_BATCH.decode(msgspec.msgpack.encode(raw))
    assert batch.algorithm == KvEventBatch(WorkerId(7)).algorithm
    assert batch.events == (UnknownKvEvent(2, "frozen"),)


def test_unknown_kv_event_survives_a_relay() -> None:
    batch = KvEventBatch(WorkerId(7), (UnknownKvEvent(2, "frozen"), BlocksCleared(3)))
    assert wire.KV_EVENT_BATCH.decode(wire.KV_EVENT_BATCH.encode(batch)) == batch
    raw = msgspec.msgpack.decode(wire.KV_EVENT_BATCH.encode(batch))
    raw["events"].append({"type": "thawed", "event_id": 4})
    mixed = wire.KV_EVENT_BATCH.decode(msgspec.msgpack.encode(raw))
    assert mixed.events == (*batch.events, UnknownKvEvent(4, "thawed"))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode("text"),
        msgspec.msgpack.encode({"worker": [1], "events": [{"event_id": 1}]}),
        msgspec.msgpack.encode({"worker": [1], "events": [{"type": "stored", "event_id": "one"}]}),
        msgspec.msgpack.encode({"events": []}),
    ],
)
def test_broken_kv_event_batch_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(BackendProtocolError, match=r"dynamo\.kv_event_batch\.v1"):
        wire.KV_EVENT_BATCH.decode(payload)


@pytest.mark.parametrize("schema", wire.CODECS)
@settings(max_examples=20)
@given(payload=st.binary(max_size=64))
def test_arbitrary_bytes_decode_or_are_refused(schema: str, payload: bytes) -> None:
    codec = wire.CODECS[schema]
    try:
        value = codec.decode(payload)
    except BackendProtocolError as error:
        assert schema in error.message
    else:
        assert isinstance(value, codec.kind)


@pytest.mark.parametrize("schema", wire.CODECS)
@settings(max_examples=20)
@given(data=st.data())
def test_truncated_payload_is_refused(schema: str, data: st.DataObject) -> None:
    codec = wire.CODECS[schema]
    whole = codec.encode(EXAMPLES[schema])
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(BackendProtocolError):
        codec.decode(whole[:cut])


@pytest.mark.parametrize("codec", [wire.GENERATE_REQUEST, wire.EVENT_ENVELOPE, wire.KV_EVENT_BATCH])
def test_text_that_is_no_utf8_is_refused(codec: wire.Codec[Any]) -> None:
    broken = b"\xa2\xff\xfe"  # a msgpack string of two bytes that no UTF-8 decoder takes
    payloads = [
        b"\x81" + broken + b"\x01",
        b"\x91" + broken,
        b"\x82\xa6worker\x92\x01\x00\xa6events\x91\x81\xa4type" + broken,
    ]
    for payload in payloads:
        with pytest.raises(BackendProtocolError, match=codec.schema):
            codec.decode(payload)


_u64 = st.integers(0, (1 << 64) - 1)
_hashes = st.lists(_u64, max_size=5).map(pack_hashes)
_tier = st.sampled_from([tier for tier in Tier if tier is not Tier.UNKNOWN])
_event = st.one_of(
    st.builds(
        BlockStored, _u64, _hashes, _hashes, st.none() | _u64, st.none() | st.integers(0, 1 << 31), _tier, st.text()
    ),
    st.builds(BlockRemoved, _u64, _hashes, _tier),
    st.builds(BlocksCleared, _u64, st.none() | _tier),
    st.builds(UnknownKvEvent, _u64, st.text()),
)
_worker = st.builds(WorkerId, st.integers(0, (1 << 53) - 1), st.integers(0, 64))


@given(st.builds(KvEventBatch, _worker, st.lists(_event, max_size=4).map(tuple), st.integers(0, 1024), st.text()))
def test_any_kv_event_batch_round_trips(batch: KvEventBatch) -> None:
    assert wire.KV_EVENT_BATCH.decode(wire.KV_EVENT_BATCH.encode(batch)) == batch


@given(
    st.builds(
        GenerateRequest,
        request_id=st.text(),
        model=st.text(),
        token_ids=st.lists(st.integers(0, (1 << 32) - 1), max_size=8).map(pack_tokens),
        attempt=st.integers(0, 9),
        deadline_s=st.none() | st.floats(0, 1e6),
        extra=st.dictionaries(st.text(), st.text() | st.integers(-(1 << 63), (1 << 64) - 1) | st.booleans()),
    )
)
def test_any_request_round_trips(request: GenerateRequest) -> None:
    assert wire.GENERATE_REQUEST.decode(wire.GENERATE_REQUEST.encode(request)) == request


def test_codecs_are_known_by_their_schema() -> None:
    assert all(codec.schema == schema for schema, codec in wire.CODECS.items())
    assert all(schema.startswith("dynamo.") and schema.endswith(".v1") for schema in wire.CODECS)


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(view: Any) -> None:
    payload = wire.GENERATE_CHUNK.encode(EXAMPLES["dynamo.generate_chunk.v1"])
    assert wire.GENERATE_CHUNK.decode(view(payload)) == EXAMPLES["dynamo.generate_chunk.v1"]
