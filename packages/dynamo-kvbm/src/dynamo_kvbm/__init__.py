"""KV block manager: keeps KV blocks beyond device memory and gives them back.

``BlockPool`` is the logical side: states, holders, prefix matches and eviction without bytes. ``HostTier`` and
``DiskTier`` are block stores to use alone; ``BlockManager`` makes a cascade of tiers one store; ``KvbmConnector`` puts
a cascade behind an engine; ``create_connector`` is what a worker loads by name.
"""

from dynamo_kvbm._connector import KvbmConnector, create_connector
from dynamo_kvbm._logical.pool import BlockPool
from dynamo_kvbm._manager import BlockManager, TierConfig
from dynamo_kvbm._settings import KvbmSettings, OffloadPolicy
from dynamo_kvbm._tiers.disk import DiskTier
from dynamo_kvbm._tiers.host import HostTier

__all__ = [
    "BlockManager",
    "BlockPool",
    "DiskTier",
    "HostTier",
    "KvbmConnector",
    "KvbmSettings",
    "OffloadPolicy",
    "TierConfig",
    "create_connector",
]
