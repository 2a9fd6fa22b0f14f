"""Nothing in the planes, discovery, cards or routing assumes text: an image and a tensor go in, tensors come out."""

import asyncio

import pytest

from dynamo_core.cards import ModelCard, is_model_ready
from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.content import ContentPart, tensor_part
from dynamo_core.discovery import Instance, ModelRecord
from dynamo_core.engine import Engine, EngineContext
from dynamo_core.enums import FinishReason, Modality, PartKind
from dynamo_core.errors import InvalidRequestError, UnsupportedMediaError
from dynamo_core.ids import EndpointId, InstanceId
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.noop import create_router
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.routing import RequestOutcome, RouterScope, RoutingRequest
from dynamo_core.streams import open_stream
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import TensorEchoEngine
from dynamo_core.wire import INSTANCE, MODEL_RECORD, Codec

ENDPOINT = EndpointId("vision", "backend", "generate")
REQUESTS = Codec(GenerateRequest, "example.tensor_request.v1")
CHUNKS = Codec(GenerateChunk, "example.tensor_chunk.v1")
IMAGE = ContentPart(PartKind.IMAGE, data=b"\x89PNG", media_type="image/png", name="photo")
TENSOR = tensor_part(bytes(range(16)), shape=(2, 2), dtype="f32", name="mask")


async def serve(context: ComponentContext, engine: Engine) -> ModelCard:
    """Do what a worker does, with nothing that knows of tokens."""
    config = await engine.start(EngineContext(InstanceId(7), context.clock, context.metrics))

    async def handle(payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
        async for chunk in engine.generate(REQUESTS.decode(payload), call):
            sink.send(CHUNKS.encode(chunk))

    card = ModelCard(
        config.model,
        model_types=config.model_types,
        model_input=config.model_input,
        input_modalities=config.input_modalities,
        output_modalities=config.output_modalities,
        endpoint_types=config.types,
    )
    served = await context.request_plane.serve(ENDPOINT, handle, schema=config.types.request)
    instance = Instance(ENDPOINT, 7, served.address, types=config.types)
    record = ModelRecord(ENDPOINT, 7, card)
    await context.discovery.put(record.key, MODEL_RECORD.encode(record))
    await context.discovery.put(instance.key, INSTANCE.encode(instance))
    return card


async def call(context: ComponentContext, request: GenerateRequest) -> list[GenerateChunk]:
    """Do what a gateway does: read the card, select, call, report."""
    (found,) = await context.discovery.list("v1/mdc/")
    card = MODEL_RECORD.decode(found.value).card
    assert is_model_ready([card])
    router = create_router(context, RouterScope(ENDPOINT, card))
    await router.start()
    decision = await router.select(RoutingRequest(request.request_id, model=card.name))
    record = await context.discovery.get(Instance(ENDPOINT, decision.worker.instance_id, "").key)
    assert record is not None
    instance = INSTANCE.decode(record.value)
    options = CallOptions(request_id=request.request_id, schema=instance.types.request)
    payload = REQUESTS.encode(request)
    try:
        stream = await open_stream(context.request_plane, instance.address, ENDPOINT, payload, options)
        return [CHUNKS.decode(item) async for item in stream]
    finally:
        assert decision.reservation is not None
        router.complete(decision.reservation, RequestOutcome(decision.decision_id))
        await router.stop()


async def run(request: GenerateRequest) -> tuple[ModelCard, list[GenerateChunk]]:
    discovery, plane, bus = MemoryDiscovery(), MemoryRequestPlane(), MemoryEventBus()
    tasks: list[asyncio.Task[None]] = []

    def spawn(coroutine, /, *, name):  # type: ignore[no-untyped-def] - the Spawner protocol types it
        tasks.append(asyncio.create_task(coroutine, name=name))
        return tasks[-1]

    context = ComponentContext("vision", discovery, plane, bus, Metrics(), SystemClock(), spawn)
    try:
        card = await serve(context, TensorEchoEngine())
        return card, await call(context, request)
    finally:
        await plane.close()
        await bus.close()
        await discovery.close()


async def test_images_and_tensors_pass_through_every_contract() -> None:
    card, chunks = await run(GenerateRequest("r", "tensor-echo", parts=(IMAGE, TENSOR), modality=Modality.TENSOR))
    assert card.endpoint_types.request == REQUESTS.schema
    assert (card.context_length, card.kv_block_size, card.eos_token_ids) == (0, 0, ())
    image, mask = (part for chunk in chunks for part in chunk.parts)
    assert (image.kind, image.dtype, image.shape, image.data) == (PartKind.TENSOR, "u8", (4,), IMAGE.data)
    assert (mask.dtype, mask.shape, mask.data, mask.index) == ("f32", (2, 2), TENSOR.data, 1)
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert all(chunk.token_ids == b"" for chunk in chunks)


async def test_errors_of_content_keep_their_type() -> None:
    with pytest.raises(UnsupportedMediaError):
        await run(GenerateRequest("r", "tensor-echo", parts=(ContentPart(PartKind.AUDIO, data=b"x"),)))
    with pytest.raises(InvalidRequestError, match="parts"):
        await run(GenerateRequest("r", "tensor-echo"))
