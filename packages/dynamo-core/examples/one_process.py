"""A request through every contract in one process: discovery, router, request plane, engine; dynamo-core alone."""

import asyncio

from dynamo_core import ComponentContext, EndpointId, GenerateRequest, ModelCard, SystemClock
from dynamo_core.discovery import Instance
from dynamo_core.engine import EngineContext
from dynamo_core.ids import new_instance_id, new_request_id
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.noop import EchoEngine, create_router
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.routing import RequestOutcome, RouterScope, RoutingRequest
from dynamo_core.streams import open_stream
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE

ENDPOINT = EndpointId("demo", "backend", "generate")


async def serve(context: ComponentContext) -> Instance:
    """A worker: starts an engine, serves it, and registers under a lease."""
    engine, instance_id = EchoEngine(), new_instance_id()
    await engine.start(EngineContext(instance_id, context.clock, context.metrics))

    async def handle(payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
        async for chunk in engine.generate(GENERATE_REQUEST.decode(payload), call):
            sink.send(GENERATE_CHUNK.encode(chunk))

    served = await context.request_plane.serve(ENDPOINT, handle, schema=GENERATE_REQUEST.schema)
    instance = Instance(ENDPOINT, instance_id, served.address)
    await context.discovery.put(instance.key, INSTANCE.encode(instance), lease=await context.discovery.lease())
    return instance


async def main() -> list[int]:
    """A client: selects a worker, calls it, and reports what became of the request."""
    discovery, plane, bus = MemoryDiscovery(), MemoryRequestPlane(), MemoryEventBus()
    async with asyncio.TaskGroup() as group:
        context = ComponentContext("demo", discovery, plane, bus, Metrics(), SystemClock(), group.create_task)
        instance = await serve(context)
        router = create_router(context, RouterScope(ENDPOINT, ModelCard("echo")))
        await router.start()
        request = GenerateRequest(new_request_id(), "echo", pack_tokens([3, 1, 4, 1, 5]))
        decision = await router.select(RoutingRequest(request.request_id, prompt_tokens=5))
        assert decision.worker.instance_id == instance.instance_id
        options = CallOptions(request_id=request.request_id, schema=GENERATE_REQUEST.schema)
        async with await open_stream(plane, instance.address, ENDPOINT, GENERATE_REQUEST.encode(request), options) as s:
            chunks = [GENERATE_CHUNK.decode(item) async for item in s]
        assert decision.reservation is not None
        router.complete(decision.reservation, RequestOutcome(decision.decision_id))
        await router.stop()
    return [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)]


if __name__ == "__main__":
    print(asyncio.run(main()))
