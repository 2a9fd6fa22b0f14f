"""Encode workers: real images, encoded on one worker, computed with on others."""

from __future__ import annotations

import asyncio
import struct
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from rig import ENGINE, SAMPLED, STOP, Pair, received

from dynamo_core.content import ContentPart
from dynamo_core.enums import FinishReason, Modality, PartKind, WorkerType
from dynamo_core.errors import ConfigurationError, DeadlineExceededError, InvalidRequestError
from dynamo_core.ids import EndpointId
from dynamo_core.requests import SamplingOptions
from dynamo_worker import ReferenceEngine
from dynamo_worker._disagg import encode
from dynamo_worker._metrics import REMOTE_ENCODES_TOTAL, REMOTE_PREFILLS_TOTAL

REMOTE: dict[str, Any] = {"remote_encode": True}


def png(seed: int, *, height: int = 40, width: int = 48) -> bytes:
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def image(seed: int = 1, *, token: int = 5) -> ContentPart:
    return ContentPart(PartKind.IMAGE, data=png(seed), media_type="image/png", metadata={"token_index": token})


class Stage(Pair):
    """Workers whose engines take images."""

    async def worker(self, role: str = "agg", **options: Any) -> Any:
        engine = ReferenceEngine.from_args([*ENGINE, "--image-encoder"])
        worker = await self.process.worker(engine, role=role, **options)
        await self.process.clock.settle()
        return worker

    def picture(self, request_id: str = "r1", *parts: ContentPart, **rest: Any) -> Any:
        return self.request(request_id, parts=parts or (image(),), **rest)

    def encodes(self, outcome: str) -> float:
        return self.metric(REMOTE_ENCODES_TOTAL, outcome=outcome)


@pytest.fixture
async def stage(process: Any, kit: Any) -> Stage:
    return Stage(process, kit)


async def test_cards_say_role_needs_and_modalities(stage: Stage) -> None:
    await stage.worker("encode")
    (record,) = await stage.process.models()
    card = record.card
    assert (record.endpoint.component, card.worker_type) == ("encode", WorkerType.ENCODE)
    assert card.needs == ((WorkerType.PREFILL, WorkerType.DECODE), (WorkerType.AGGREGATED,))
    assert Modality.IMAGE in card.input_modalities


async def test_an_image_changes_the_output_and_equal_ones_change_it_alike(stage: Stage) -> None:
    alone = await stage.worker()
    plain = await stage.ask(alone, stage.request("plain"))
    first = await stage.ask(alone, stage.picture("first"))
    again = await stage.ask(alone, stage.picture("again"))
    other = await stage.ask(alone, stage.picture("other", image(2)))
    assert first.tokens == again.tokens
    assert len({tuple(reply.tokens) for reply in (plain, first, other)}) == 3
    assert again.chunks[-1].usage.cached_tokens == 88, "an equal image shares the KV blocks"
    assert other.chunks[-1].usage.cached_tokens == 4, "another one shares only those before it"


@pytest.mark.parametrize("sampling", [SamplingOptions(temperature=0.0), SAMPLED])
async def test_an_encode_worker_changes_nothing_but_the_place(stage: Stage, sampling: SamplingOptions) -> None:
    await stage.worker("encode")
    apart = await stage.worker(worker_component="apart", **REMOTE)
    alone = await stage.worker(worker_component="alone")
    request = stage.picture("r1", image(1), image(2, token=40), sampling=sampling)
    reply = await stage.ask(apart, request)
    assert reply.error is None
    assert reply.tokens == (await stage.ask(alone, request)).tokens
    assert stage.encodes("remote") == 1


@pytest.mark.parametrize("form", ["pull", "bootstrap"])
async def test_encode_prefill_and_decode_apart_equal_one_worker(stage: Stage, form: str) -> None:
    """The decode worker has the image encoded, the prefill worker computes with the vector, the decode worker too."""
    await stage.worker("encode")
    await stage.worker("prefill")
    decode = await stage.worker("decode", remote_prefill_threshold_tokens=0, kv_handoff=form, **REMOTE)
    alone = await stage.worker(worker_component="alone")
    request = stage.picture("r1", image(1), image(2, token=89), sampling=SAMPLED)
    reply = await stage.ask(decode, request)
    assert reply.tokens == (await stage.ask(alone, request)).tokens
    assert received(stage) == 22
    assert stage.encodes("remote") == stage.metric(REMOTE_PREFILLS_TOTAL, outcome="remote") == 1


async def test_a_prefill_worker_asks_by_itself_when_the_image_comes_raw(stage: Stage) -> None:
    """As a frontend that makes the hops sends it: the blocks go by the hash of the raw image either way."""
    await stage.worker("encode")
    stage.prefill = await stage.worker("prefill", **REMOTE)
    decode = await stage.worker("decode")
    alone = await stage.worker(worker_component="alone")
    request = stage.picture()
    handoff = await stage.hand_over(request)
    reply = await stage.ask(decode, msgspec.structs.replace(request, handoff=handoff))
    assert reply.tokens == (await stage.ask(alone, request)).tokens
    assert (received(stage), stage.encodes("remote")) == (22, 1)


async def test_a_frontend_can_pass_encoded_parts_on(stage: Stage) -> None:
    encoder = await stage.worker("encode")
    alone = await stage.worker()
    request = stage.picture()
    (chunk,) = (await stage.ask(encoder, request)).chunks
    assert (chunk.finish_reason, chunk.token_ids) == (FinishReason.STOP, b"")
    (part,) = chunk.parts
    assert (part.kind, part.shape, part.metadata) == (PartKind.TENSOR, (128,), {"token_index": 5})
    encoded = await stage.ask(alone, msgspec.structs.replace(request, request_id="encoded", parts=chunk.parts))
    assert encoded.tokens == (await stage.ask(alone, request)).tokens


async def test_recent_encodings_are_kept_within_a_bound(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_KEPT_ENCODINGS", 2)
    await stage.worker("encode")
    apart = await stage.worker(**REMOTE)
    for name, seed in (("a", 1), ("b", 2), ("c", 1), ("d", 3), ("e", 1), ("f", 2)):
        assert (await stage.ask(apart, stage.picture(name, image(seed)))).error is None
    assert (stage.encodes("kept"), stage.encodes("remote")) == (2, 4)
    assert len(apart._role.engine._preparation._kept) == 2


async def test_choices_of_one_request_share_the_hops(stage: Stage) -> None:
    await stage.worker("encode")
    await stage.worker("prefill")
    decode = await stage.worker("decode", remote_prefill_threshold_tokens=0, local_prefill=False, **REMOTE)
    reply = await stage.ask(decode, stage.picture(sampling=SamplingOptions(temperature=0.9, seed=3, n=3)))
    assert reply.error is None
    assert [len(reply.of_choice(choice)) for choice in range(3)] == [12, 12, 12]


async def test_without_an_encode_worker_the_engine_encodes(stage: Stage) -> None:
    worker = await stage.worker(**REMOTE)
    assert (await stage.ask(worker, stage.picture())).error is None
    assert stage.encodes("no_peer") == 1


async def test_without_an_encode_worker_and_fallback_it_is_unavailable(stage: Stage) -> None:
    worker = await stage.worker(local_encode=False, **REMOTE)
    reply = await stage.ask(worker, stage.picture())
    assert reply.error.reason == "backend.worker_unavailable"


async def test_a_dead_encode_worker_costs_one_attempt(stage: Stage) -> None:
    dead = await stage.worker("encode")
    await stage.worker("encode")
    worker = await stage.worker(local_encode=False, **REMOTE)
    await dead._served.close()
    for seed in (1, 2, 3):
        assert (await stage.ask(worker, stage.picture(f"r{seed}", image(seed)))).error is None
    assert stage.encodes("remote") == 3


@pytest.mark.parametrize("local", [True, False])
async def test_a_silent_encode_worker_does_not_hang_the_request(stage: Stage, local: bool) -> None:
    encoder = await stage.worker("encode")
    worker = await stage.worker(local_encode=local, encode_timeout_s=3.0, **REMOTE)
    asked, left = asyncio.Event(), asyncio.Event()

    async def silent(parts: Any) -> Any:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    encoder._role.engine._encoder.encode = silent
    reply = await stage.call(worker, stage.picture())
    await asyncio.wait_for(asked.wait(), 20)
    await stage.process.clock.advance(3.5)
    await asyncio.wait_for(reply.done.wait(), 20)
    if local:
        assert reply.error is None
    else:
        assert isinstance(reply.error, DeadlineExceededError)
        assert reply.error.reason == "backend.encode_timeout"
    assert stage.encodes("timeout") == 1
    await asyncio.wait_for(left.wait(), 20)


async def test_cancelling_while_an_image_is_encoded(stage: Stage) -> None:
    encoder = await stage.worker("encode")
    worker = await stage.worker(**REMOTE)
    asked = asyncio.Event()

    async def silent(parts: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    encoder._role.engine._encoder.encode = silent
    reply = await stage.call(worker, stage.picture())
    await asyncio.wait_for(asked.wait(), 20)
    reply.call.cancel()
    await asyncio.wait_for(reply.done.wait(), 20)
    assert reply.finish is FinishReason.CANCELLED


async def test_an_encode_worker_that_answers_too_few_parts(stage: Stage) -> None:
    encoder = await stage.worker("encode")
    worker = await stage.worker(local_encode=False, **REMOTE)

    async def nothing(parts: Any) -> Any:
        return ()

    encoder._role.engine._encoder.encode = nothing
    reply = await stage.ask(worker, stage.picture())
    assert "0 parts for 1" in reply.error.message


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (ContentPart(PartKind.IMAGE, data=b"GIF89a"), "does not begin as one"),
        (ContentPart(PartKind.IMAGE, url="https://example.com/a.png"), "send images inline"),
        (ContentPart(PartKind.AUDIO, data=b"RIFF"), "kind 'audio'"),
        (image(token=90), "belongs to token 90, the prompt has 90"),
        (ContentPart(PartKind.IMAGE, data=png(1), metadata={"token_index": -1}), "token_index -1"),
        (ContentPart(PartKind.TENSOR, data=b"1234", shape=(1,), dtype="f32", name="image_embedding"), r"shape \(1,\)"),
    ],
)
@pytest.mark.parametrize("remote", [True, False])
async def test_what_is_no_image_is_refused_by_name(stage: Stage, part: ContentPart, message: str, remote: bool) -> None:
    if remote:
        await stage.worker("encode")
    worker = await stage.worker(remote_encode=remote)
    reply = await stage.ask(worker, stage.picture("r1", part))
    assert isinstance(reply.error, InvalidRequestError)
    import re

    assert re.search(message, reply.error.message)
    assert (await stage.ask(worker, stage.request("next"))).error is None


async def test_an_encode_worker_answers_probes_and_refuses_text(stage: Stage) -> None:
    encoder = await stage.worker("encode")
    probe = await stage.ask(encoder, stage.request("probe", [1], stop=STOP, health_check=True))
    assert (probe.error, len(probe.tokens)) == (None, 12)
    reply = await stage.ask(encoder, stage.request("text"))
    assert isinstance(reply.error, InvalidRequestError)
    assert reply.error.param == "parts"


async def test_engines_without_an_encoder_take_neither_role_nor_images(stage: Stage) -> None:
    with pytest.raises(ConfigurationError, match="--image-encoder"):
        await stage.process.worker(ReferenceEngine.from_args(ENGINE), role="encode")
    plain = await stage.process.worker(ReferenceEngine.from_args(ENGINE), worker_component="plain")
    reply = await stage.ask(plain, stage.picture())
    assert isinstance(reply.error, InvalidRequestError)
    assert EndpointId("test", "plain", "generate") == plain.endpoint
