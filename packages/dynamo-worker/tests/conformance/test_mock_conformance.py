from dynamo_core.component import Component, ComponentContext
from dynamo_core.engine import Engine
from dynamo_core.testing import ComponentConformance, EngineConformance
from dynamo_worker import MockEngine, MockSettings, WorkerSettings, create_worker


class TestMockEngine(EngineConformance):
    factory = MockEngine

    def make_engine(self) -> Engine:
        return MockEngine(MockSettings(speedup_ratio=4.0, kv_block_size=4))


class TestWorkerComponent(ComponentConformance):
    def make_component(self, context: ComponentContext) -> Component:
        return create_worker(context, WorkerSettings(engine="mock"))
