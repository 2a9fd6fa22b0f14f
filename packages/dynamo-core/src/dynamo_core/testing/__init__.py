"""The conformance kit: one suite per contract, a fake clock, and golden files of every wire type.

Install it with ``dynamo-core[testing]``. Subclass a suite in your tests, supply its factories, and every rule of the
contract runs against your implementation.
"""

from dynamo_core.testing._clock import FakeClock
from dynamo_core.testing._component import ComponentConformance
from dynamo_core.testing._discovery import DiscoveryConformance
from dynamo_core.testing._engine import EngineConformance
from dynamo_core.testing._engine_guided import GuidedEngineConformance
from dynamo_core.testing._engine_lifecycle import EngineLifecycleConformance
from dynamo_core.testing._event_bus import EventBusConformance
from dynamo_core.testing._event_bus_snapshots import SnapshotBusConformance
from dynamo_core.testing._kv import BlockStoreConformance, DeviceBlocks, KvConnectorConformance
from dynamo_core.testing._parsing import OutputParserConformance
from dynamo_core.testing._plane_suite import RecordingReceiver
from dynamo_core.testing._planning import LoadPredictorConformance, PlannerConformance, ScalingTargetConformance
from dynamo_core.testing._request_plane import RequestPlaneConformance
from dynamo_core.testing._router import RouterConformance
from dynamo_core.testing._suite import ConformanceSuite
from dynamo_core.testing._tensor import TensorEchoEngine

__all__ = [
    "BlockStoreConformance",
    "ComponentConformance",
    "ConformanceSuite",
    "DeviceBlocks",
    "DiscoveryConformance",
    "EngineConformance",
    "EngineLifecycleConformance",
    "EventBusConformance",
    "FakeClock",
    "GuidedEngineConformance",
    "KvConnectorConformance",
    "LoadPredictorConformance",
    "OutputParserConformance",
    "PlannerConformance",
    "RecordingReceiver",
    "RequestPlaneConformance",
    "RouterConformance",
    "ScalingTargetConformance",
    "SnapshotBusConformance",
    "TensorEchoEngine",
]
