"""The conformance kit: one suite per contract, a fake clock, and golden files of every wire type.

Install it with ``dynamo-core[testing]``. Subclass a suite in your tests, supply its factories, and every rule of the
contract runs against your implementation.
"""

from dynamo_core.testing._clock import FakeClock
from dynamo_core.testing._discovery import DiscoveryConformance
from dynamo_core.testing._event_bus import EventBusConformance
from dynamo_core.testing._request_plane import RequestPlaneConformance
from dynamo_core.testing._suite import ConformanceSuite

__all__ = [
    "ConformanceSuite",
    "DiscoveryConformance",
    "EventBusConformance",
    "FakeClock",
    "RequestPlaneConformance",
]
