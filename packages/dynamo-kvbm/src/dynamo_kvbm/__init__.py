"""KV block manager: keeps KV blocks beyond device memory and gives them back.

``BlockPool`` is the logical side: states, holders, prefix matches and eviction without bytes. ``HostTier`` and
``DiskTier`` are block stores to use alone; ``BlockManager`` makes a cascade of tiers one store; ``KvbmConnector`` puts
a cascade behind an engine; ``create_connector`` is what a worker loads by name. ``dynamo_kvbm.connector_sdk`` has both
sides for engines whose scheduler and workers are apart.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_kvbm._connector import KvbmConnector as KvbmConnector
    from dynamo_kvbm._connector import create_connector as create_connector
    from dynamo_kvbm._logical.pool import BlockPool as BlockPool
    from dynamo_kvbm._manager import BlockManager as BlockManager
    from dynamo_kvbm._manager import TierConfig as TierConfig
    from dynamo_kvbm._settings import KvbmSettings as KvbmSettings
    from dynamo_kvbm._settings import OffloadPolicy as OffloadPolicy
    from dynamo_kvbm._tiers.disk import DiskTier as DiskTier
    from dynamo_kvbm._tiers.host import HostTier as HostTier

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

_HOME = {
    "BlockManager": "_manager",
    "BlockPool": "_logical.pool",
    "DiskTier": "_tiers.disk",
    "HostTier": "_tiers.host",
    "KvbmConnector": "_connector",
    "KvbmSettings": "_settings",
    "OffloadPolicy": "_settings",
    "TierConfig": "_manager",
    "create_connector": "_connector",
}


def __getattr__(name: str) -> Any:
    # An eviction plug-in need not wait for NumPy, pydantic and prometheus-client.
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dynamo_kvbm.{home}"), name)
