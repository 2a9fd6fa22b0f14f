"""KV block manager: keeps KV blocks beyond device memory and gives them back.

``HostTier`` is a block store to use alone; ``KvbmConnector`` puts it behind an engine; ``create_connector`` is what a
worker loads by name.
"""

from dynamo_kvbm._connector import KvbmConnector, create_connector
from dynamo_kvbm._settings import KvbmSettings, OffloadPolicy
from dynamo_kvbm._tiers.host import HostTier

__all__ = ["HostTier", "KvbmConnector", "KvbmSettings", "OffloadPolicy", "create_connector"]
