"""The no-op parts pass the suites."""

from collections.abc import Mapping
from typing import ClassVar

from dynamo_core.component import ComponentContext, Health
from dynamo_core.content import ContentPart, tensor_part
from dynamo_core.discovery import Instance
from dynamo_core.engine import EngineFactory
from dynamo_core.enums import HealthState, Modality, PartKind
from dynamo_core.ids import EndpointId, InstanceId
from dynamo_core.noop import (
    DictBlockStore,
    EchoEngine,
    HoldPlanner,
    LastValuePredictor,
    NullKvConnector,
    RoundRobinRouter,
    StaticScalingTarget,
    create_router,
)
from dynamo_core.planes import RequestContext, ResponseSink, ServedEndpoint
from dynamo_core.requests import GenerateRequest
from dynamo_core.routing import RouterScope
from dynamo_core.testing import (
    BlockStoreConformance,
    ComponentConformance,
    EngineConformance,
    EngineLifecycleConformance,
    KvConnectorConformance,
    LoadPredictorConformance,
    PlannerConformance,
    RouterConformance,
    ScalingTargetConformance,
    TensorEchoEngine,
)
from dynamo_core.wire import INSTANCE


class TestEchoEngine(EngineConformance):
    factory: ClassVar[EngineFactory] = EchoEngine

    def make_engine(self) -> EchoEngine:
        return EchoEngine(context_length=1024)


class TestTensorEchoEngine(EngineLifecycleConformance):
    factory: ClassVar[EngineFactory] = TensorEchoEngine

    def make_engine(self) -> TensorEchoEngine:
        return TensorEchoEngine()

    def make_request(self, request_id: str) -> GenerateRequest:
        image = ContentPart(PartKind.IMAGE, data=b"\x89PNG", media_type="image/png")
        tensor = tensor_part(bytes(16), shape=(2, 2), dtype="f32", name="x")
        return GenerateRequest(request_id, "tensor-echo", parts=(image, tensor), modality=Modality.TENSOR)

    def make_long_request(self, request_id: str) -> GenerateRequest:
        parts = tuple(tensor_part(bytes(4), shape=(1,), dtype="i32", name=f"{i}") for i in range(64))
        return GenerateRequest(request_id, "tensor-echo", parts=parts, modality=Modality.TENSOR)


class TestRoundRobinRouter(RouterConformance):
    def make_router(self, context: ComponentContext, scope: RouterScope) -> RoundRobinRouter:
        return create_router(context, scope)


class TestDictBlockStore(BlockStoreConformance):
    def make_store(self, capacity_blocks: int) -> DictBlockStore:
        return DictBlockStore(capacity_blocks)


class TestNullKvConnector(KvConnectorConformance):
    def make_connector(self) -> NullKvConnector:
        return NullKvConnector()


class TestHoldPlanner(PlannerConformance):
    def make_planner(self) -> HoldPlanner:
        return HoldPlanner()


class TestLastValuePredictor(LoadPredictorConformance):
    def make_predictor(self) -> LastValuePredictor:
        return LastValuePredictor()


class TestStaticScalingTarget(ScalingTargetConformance):
    async def make_target(self, replicas: Mapping[str, int]) -> StaticScalingTarget:
        return StaticScalingTarget(replicas)


class EchoComponent:
    """A component that serves one endpoint under a lease."""

    name = "echo"

    def __init__(self, context: ComponentContext) -> None:
        self._context = context
        self._served: ServedEndpoint | None = None
        self._key = ""

    async def start(self) -> None:
        endpoint = EndpointId(self._context.namespace, "echo", "generate")
        self._served = await self._context.request_plane.serve(endpoint, self._handle)
        instance = Instance(endpoint, InstanceId(7), self._served.address)
        await self._context.discovery.put(instance.key, INSTANCE.encode(instance))
        self._key = instance.key
        self._context.health.register(self.name, lambda: Health(HealthState.READY))

    async def drain(self, timeout_s: float) -> None:
        assert self._served is not None
        await self._leave()
        await self._served.drain(timeout_s)

    async def stop(self) -> None:
        await self._leave()
        self._context.health.unregister(self.name)
        if self._served is not None:
            await self._served.close()

    async def _leave(self) -> None:
        if self._key:
            await self._context.discovery.delete(self._key)
            self._key = ""

    async def _handle(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(payload)


class TestEchoComponent(ComponentConformance):
    def make_component(self, context: ComponentContext) -> EchoComponent:
        return EchoComponent(context)
