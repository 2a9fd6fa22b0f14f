"""The three planes inside one process: no sockets, no files, no threads.

Each plane object is one client of a store that ``peer()`` shares, so that a test can close one side and keep the
other. A factory call makes a store of its own: whoever hosts several components in one process passes the same plane
objects (or peers of them) to all of them.
"""

from dynamo_core.memory.discovery import MemoryDiscovery, MemoryLease, create_discovery
from dynamo_core.memory.event_bus import MemoryEventBus, create_event_bus
from dynamo_core.memory.request_plane import MemoryRequestPlane, create_request_plane

__all__ = [
    "MemoryDiscovery",
    "MemoryEventBus",
    "MemoryLease",
    "MemoryRequestPlane",
    "create_discovery",
    "create_event_bus",
    "create_request_plane",
]
