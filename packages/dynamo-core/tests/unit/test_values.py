"""Small values: identities, cards, keys, content, blocks, requests, traffic."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.cards import CheckedFile, LoraInfo, ModelCard, ModelRuntimeConfig, is_model_ready
from dynamo_core.content import ContentPart, tensor_part, text_part, tokens_part
from dynamo_core.discovery import EventChannel, Instance, ModelRecord, endpoint_prefix, quote_segment
from dynamo_core.enums import PartKind, WorkerType
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import (
    MAX_INSTANCE_ID,
    EndpointId,
    InstanceId,
    WorkerId,
    format_instance_id,
    new_instance_id,
    new_publisher_id,
    new_request_id,
    parse_instance_id,
)
from dynamo_core.kv import BlockLayout
from dynamo_core.planes import Topic
from dynamo_core.planning import TrafficStats, total_traffic
from dynamo_core.requests import GenerateRequest, GuidedDecoding, SamplingOptions, Usage
from dynamo_core.tokens import pack_tokens

ENDPOINT = EndpointId("ns", "backend", "generate")
segments = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)


@given(segments, segments, segments)
def test_endpoint_round_trips(namespace: str, component: str, endpoint: str) -> None:
    found = EndpointId(namespace, component, endpoint)
    assert EndpointId.parse(str(found)) == found == EndpointId.parse(f"dyn://{found}")


@pytest.mark.parametrize(
    "text", ["", "a.b", "a.b.c.d", "a..c", "a.b/c.d", "a.b.c\n", "dyn://", "ä.b.c", "a.b." + "c" * 129]
)
def test_bad_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"namespace\.component\.endpoint"):
        EndpointId.parse(text)


@given(st.integers(0, MAX_INSTANCE_ID))
def test_instance_id_round_trips(value: int) -> None:
    assert parse_instance_id(format_instance_id(InstanceId(value))) == value


@pytest.mark.parametrize("text", ["", "xyz", "-1", "20000000000000", "1_0", " 1", "0x1f", "+1"])
def test_bad_instance_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="53 bits"):
        parse_instance_id(text)


def test_new_ids_are_in_range_and_differ() -> None:
    for make in (new_instance_id, new_publisher_id):
        found = {make() for _ in range(100)}
        assert len(found) == 100
        assert all(1 <= value <= MAX_INSTANCE_ID for value in found)
    assert len({new_request_id() for _ in range(100)}) == 100
    assert len(new_request_id()) == 32


def test_worker_id_prints_as_hex_and_sorts() -> None:
    assert str(WorkerId(255, 3)) == "ff/3"
    assert sorted([WorkerId(2), WorkerId(1, 1), WorkerId(1)]) == [WorkerId(1), WorkerId(1, 1), WorkerId(2)]


def test_checksum_ignores_what_a_worker_alone_knows() -> None:
    card = ModelCard("m", context_length=4096)
    alike = msgspec.structs.replace(
        card, model_path="/elsewhere", user_data={"a": 1}, runtime_config=ModelRuntimeConfig(total_kv_blocks=7)
    )
    assert card.checksum == alike.checksum
    assert len(card.checksum) == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "n"},
        {"context_length": 1},
        {"kv_block_size": 16},
        {"eos_token_ids": (1,)},
        {"lora": LoraInfo("a")},
        {"worker_type": WorkerType.DECODE},
        {"files": {"tokenizer": CheckedFile("a", "01")}},
        {"router_config": {"t": 1}},
    ],
)
def test_checksum_covers_what_a_set_must_agree_on(changes: dict[str, object]) -> None:
    card = ModelCard("m")
    assert msgspec.structs.replace(card, **changes).checksum != card.checksum


def test_checksum_covers_file_content_not_place_or_order() -> None:
    one = ModelCard("m", files={"a": CheckedFile("/x/a", "01"), "b": CheckedFile("/x/b", "02")})
    two = ModelCard("m", files={"b": CheckedFile("/y/b", "02"), "a": CheckedFile("/y/a", "01")})
    swapped = ModelCard("m", files={"a": CheckedFile("/x/a", "02"), "b": CheckedFile("/x/b", "01")})
    assert one.checksum == two.checksum != swapped.checksum


def test_checksum_takes_any_router_config() -> None:
    assert ModelCard("m", router_config={"weights": {1: 2.0, 2: 1.0}}).checksum
    one = ModelCard("m", router_config={"a": 1, "b": 2})
    assert one.checksum == ModelCard("m", router_config={"b": 2, "a": 1}).checksum


def test_readiness_needs_someone_who_answers_and_every_need() -> None:
    prefill = ModelCard("m", worker_type=WorkerType.PREFILL, needs=((WorkerType.DECODE,),))
    decode = ModelCard("m", worker_type=WorkerType.DECODE, needs=((WorkerType.PREFILL,), (WorkerType.AGGREGATED,)))
    plain = ModelCard("m")
    assert not is_model_ready([])
    assert not is_model_ready([prefill])
    assert not is_model_ready([decode])
    assert is_model_ready([decode, prefill])
    assert is_model_ready([decode, plain])
    assert is_model_ready([plain])
    assert not is_model_ready([plain, prefill])


def test_needs_ask_for_all_members_of_one_group() -> None:
    card = ModelCard("m", needs=((WorkerType.PREFILL, WorkerType.ENCODE),))
    assert not card.is_ready({WorkerType.PREFILL})
    assert card.is_ready({WorkerType.PREFILL, WorkerType.ENCODE})


def test_keys_follow_the_layout() -> None:
    assert Instance(ENDPOINT, 255, "").key == "v1/instances/ns/backend/generate/ff"
    assert ModelRecord(ENDPOINT, 255, ModelCard("m")).key == "v1/mdc/ns/backend/generate/ff"
    assert (
        ModelRecord(ENDPOINT, 255, ModelCard("m"), "org/lora.1").key == "v1/mdc/ns/backend/generate/ff/org%2Flora%2E1"
    )
    assert EventChannel("ns.a.kv-events", 255, "").key == "v1/event_channels/ns%2Ea%2Ekv-events/ff"
    assert Instance(ENDPOINT, 255, "").key.startswith("v1/instances/" + endpoint_prefix(ENDPOINT))


@given(st.text(min_size=1), st.text(min_size=1))
def test_quoted_segments_are_safe_and_stay_apart(one: str, two: str) -> None:
    def is_encodable(text: str) -> bool:
        return not any("\ud800" <= char <= "\udfff" for char in text)

    if is_encodable(one) and is_encodable(two):
        assert (quote_segment(one) == quote_segment(two)) == (one == two)
        assert set(quote_segment(one)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_%")


def test_topic_leaves_empty_parts_out() -> None:
    assert str(Topic.of("load", ENDPOINT)) == "ns.backend.generate.load"
    assert str(Topic("traffic", "ns")) == "ns.traffic"


def test_parts_are_made_of_their_content() -> None:
    assert text_part("x") == ContentPart(PartKind.TEXT, text="x")
    assert tokens_part(pack_tokens((1,)), index=2).data == pack_tokens((1,))
    assert tensor_part(bytes(24), shape=[2, 3], dtype="f32").shape == (2, 3)
    assert tensor_part(bytes(4), shape=(), dtype="i32").shape == ()
    assert tensor_part(b"", shape=(0, 5), dtype="f16").data == b""


@pytest.mark.parametrize(
    ("size", "shape", "dtype", "word"),
    [
        (8, (2, 2), "f32", "16 bytes"),
        (4, (1,), "f8", "dtype"),
        (16, (-2, -2), "f32", "shape"),
        (0, (-1, 0), "u8", "shape"),
    ],
)
def test_bad_tensor_is_refused(size: int, shape: tuple[int, ...], dtype: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        tensor_part(bytes(size), shape=shape, dtype=dtype)


def test_block_layout_counts_its_bytes() -> None:
    layout = BlockLayout(num_layers=2, block_size=16, kv_heads=4, head_dim=8, dtype="bf16")
    assert layout.shape == (2, 2, 16, 4, 8)
    assert layout.block_bytes == 2 * 2 * 16 * 4 * 8 * 2


def test_block_layout_refuses_an_unknown_dtype() -> None:
    with pytest.raises(InvalidRequestError, match=r"'f4'.*f32"):
        BlockLayout(1, 1, 1, 1, dtype="f4")


def test_guided_decoding_takes_one_constraint() -> None:
    assert GuidedDecoding(regex="a", backend="x").regex == "a"
    with pytest.raises(InvalidRequestError, match="json and regex"):
        GuidedDecoding(json={}, regex="a")


@pytest.mark.parametrize("field", ["extra", "logit_bias"])
def test_dictionary_defaults_are_not_shared(field: str) -> None:
    one, two = GenerateRequest("1", "m"), GenerateRequest("2", "m")
    assert one.extra is not two.extra
    assert SamplingOptions().logit_bias is not SamplingOptions().logit_bias
    assert ModelCard("a").files is not ModelCard("b").files
    nested = ModelRuntimeConfig()
    nested.runtime_data["x"] = 1
    assert ModelRuntimeConfig().runtime_data == {}


def test_nested_defaults_do_not_leak_between_records() -> None:
    ModelCard("a").runtime_config.runtime_data["x"] = 1
    GenerateRequest("1", "m").sampling.logit_bias[1] = 2.0
    assert ModelCard("b").runtime_config.runtime_data == {}
    assert GenerateRequest("2", "m").sampling.logit_bias == {}


def test_accepted_tokens_are_those_after_the_prompt() -> None:
    assert GenerateRequest("r", "m", pack_tokens(range(5))).accepted_tokens == 0
    assert GenerateRequest("r", "m", pack_tokens(range(5)), prompt_tokens=3).accepted_tokens == 2


def test_usage_adds_up() -> None:
    assert Usage(3, 4).total_tokens == 7


def test_traffic_adds_up() -> None:
    one = TrafficStats("m", 30.0, 1, 2, 3, 4, 5, (0.1,), (0.01,), 100.0)
    two = TrafficStats("m", 20.0, 10, 20, 30, 40, 50, (0.2,), (0.02,), 90.0)
    assert total_traffic([]) is None
    assert total_traffic([one, two]) == TrafficStats("m", 30.0, 11, 22, 33, 44, 55, (0.1, 0.2), (0.01, 0.02), 100.0)
    mixed = total_traffic([one, msgspec.structs.replace(two, model="n")])
    assert mixed is not None
    assert mixed.model == "*"
