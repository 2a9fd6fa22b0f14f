"""What etcd refuses, as the typed errors of a discovery plane."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from dynamo_runtime._discovery.connection import StoreConnection
from dynamo_runtime._discovery.etcd_client import EtcdError, as_discovery_error

T = TypeVar("T")


class EtcdConnection(StoreConnection):
    """A connection that types etcd's refusals."""

    async def reaching(self, work: Coroutine[Any, Any, T]) -> T:
        """Await calls to the store, note whether they reached it, and type their refusals."""
        try:
            return await super().reaching(work)
        except EtcdError as error:
            self.note_reached()
            raise as_discovery_error(error) from error
