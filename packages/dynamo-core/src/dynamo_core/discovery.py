"""Discovery: who is there, under which lease, and how one learns of changes.

The plane is a small key-value store with leases, revisions, watches and compare-and-set. Typed records live under the
key layout below; whoever watches sees an upsert or a removal, and a resync after a lost connection is a diff.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import Protocol, TypeAlias, runtime_checkable

import msgspec

from dynamo_core.cards import EndpointTypes, ModelCard
from dynamo_core.ids import EndpointId, InstanceId, format_instance_id

INSTANCES_PREFIX = "v1/instances/"
MODELS_PREFIX = "v1/mdc/"
EVENT_CHANNELS_PREFIX = "v1/event_channels/"
DEFAULT_LEASE_TTL_S = 10.0


class Instance(msgspec.Struct, frozen=True, omit_defaults=True):
    """One live process serving one endpoint.

    Attributes:
        endpoint: What it serves.
        instance_id: Which one it is.
        address: Where, as a URL of the request plane (``tcp://10.0.0.7:4711``, ``mem://...``).
        types: Schemas it takes and gives.
        device_type: ``cuda``, ``cpu`` and the like.
        metadata: Low-volume facts: host name, process id, version.
    """

    endpoint: EndpointId
    instance_id: int
    address: str
    types: EndpointTypes = EndpointTypes()
    device_type: str = ""
    metadata: dict[str, str] = {}

    @property
    def key(self) -> str:
        """Discovery key."""
        return INSTANCES_PREFIX + instance_suffix(self.endpoint, InstanceId(self.instance_id))


class ModelRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """The card that an instance publishes for one model or LoRA."""

    endpoint: EndpointId
    instance_id: int
    card: ModelCard
    suffix: str = ""

    @property
    def key(self) -> str:
        """Discovery key; a LoRA's record has its name as suffix."""
        key = MODELS_PREFIX + instance_suffix(self.endpoint, InstanceId(self.instance_id))
        return f"{key}/{quote_segment(self.suffix)}" if self.suffix else key


class EventChannel(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a publisher of a topic can be heard."""

    topic: str
    publisher_id: int
    address: str
    replay_address: str = ""

    @property
    def key(self) -> str:
        """Discovery key."""
        return f"{EVENT_CHANNELS_PREFIX}{quote_segment(self.topic)}/{self.publisher_id:x}"


class Record(msgspec.Struct, frozen=True):
    """A key's present value and the revision that wrote it."""

    key: str
    value: bytes
    revision: int


class RecordPut(msgspec.Struct, frozen=True):
    """A key was written (created or replaced)."""

    key: str
    value: bytes
    revision: int


class RecordDeleted(msgspec.Struct, frozen=True):
    """A key is gone: deleted, or its lease ended."""

    key: str
    revision: int


class WatchSynced(msgspec.Struct, frozen=True):
    """Everything up to ``revision`` has been delivered: after the first listing, and after every resync.

    Attributes:
        revision: Revision the view corresponds to.
        resync: True if the connection had been lost and the view was rebuilt by diff.
    """

    revision: int
    resync: bool = False


WatchEvent: TypeAlias = RecordPut | RecordDeleted | WatchSynced
"""What a watch yields."""


class DiscoveryStatus(msgspec.Struct, frozen=True):
    """Health of the connection to the discovery backend.

    Attributes:
        connected: Whether the last operation reached it.
        detail: For people.
        stale_for_s: Seconds since the view was last known to be true; 0 while connected.
    """

    connected: bool
    detail: str = ""
    stale_for_s: float = 0.0


@runtime_checkable
class Lease(Protocol):
    """A promise to stay alive: keys under it vanish when it ends. Kept alive in the background by its maker."""

    @property
    def id(self) -> int:
        """Identity, unique within the backend."""
        ...

    @property
    def valid(self) -> bool:
        """False once the backend has declared it ended."""
        ...

    async def revoke(self) -> None:
        """End it now and delete its keys. Idempotent."""
        ...


@runtime_checkable
class Discovery(Protocol):
    """The discovery plane. All methods may be called concurrently from one event loop.

    A backend that loses its connection keeps retrying, re-creates leases and their keys, and resyncs watches; calls
    made meanwhile raise ``UnavailableError``. Cancelling any call leaves the store consistent: the operation
    happened or did not.
    """

    async def start(self) -> None:
        """Connect. Raises ``UnavailableError`` if the backend cannot be reached within its start-up limit."""
        ...

    async def close(self) -> None:
        """Revoke own leases, end own watches, disconnect. Idempotent."""
        ...

    async def lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        """Create a lease that lives as long as this process does, plus at most ``ttl_s``."""
        ...

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Write a key and return its revision.

        Raises:
            ConflictError: if the lease has ended.
        """
        ...

    async def compare_and_set(
        self, key: str, value: bytes, *, expected: int | None, lease: Lease | None = None
    ) -> int | None:
        """Write a key if its revision is ``expected`` (None: if it is absent).

        Returns:
            The new revision, or None if the comparison failed.
        """
        ...

    async def get(self, key: str) -> Record | None:
        """Return a key's record, or None."""
        ...

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether it was there."""
        ...

    async def list(self, prefix: str) -> list[Record]:
        """Return the records under a prefix, in key order."""
        ...

    def watch(self, prefix: str) -> AsyncIterator[WatchEvent]:
        """Yield present records, then ``WatchSynced``, then changes in order, until closed or cancelled."""
        ...

    def status(self) -> DiscoveryStatus:
        """Return the state of the connection, for ``/ready``. Does no I/O."""
        ...


class DiscoveryFactory(Protocol):
    """Entry of ``dynamo_core.discoveries``: makes a backend for a URL of its scheme."""

    def __call__(self, url: str, *, clock: object, options: Mapping[str, object]) -> Discovery:
        """Return a backend that is not yet started. ``clock`` is a ``dynamo_core.clock.Clock``.

        ``options`` may hold ``metrics``, a ``dynamo_core.telemetry.Metrics`` to register in; who has none ignores it.
        """
        ...


def quote_segment(text: str) -> str:
    """Percent-encode one key segment, except letters, digits, dash and underscore."""
    quoted = urllib.parse.quote(text, safe="")
    return quoted.replace(".", "%2E").replace("~", "%7E")


def instance_suffix(endpoint: EndpointId, instance_id: InstanceId) -> str:
    """Return ``namespace/component/endpoint/<hex id>`` as it stands in keys."""
    return f"{endpoint_prefix(endpoint)}{format_instance_id(instance_id)}"


def endpoint_prefix(endpoint: EndpointId) -> str:
    """Return ``namespace/component/endpoint/`` as it stands in keys."""
    parts = (endpoint.namespace, endpoint.component, endpoint.endpoint)
    return "/".join(quote_segment(part) for part in parts) + "/"
