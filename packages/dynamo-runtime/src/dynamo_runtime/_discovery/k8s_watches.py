"""Watches of Kubernetes, and which pods are ready."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import structlog

from dynamo_core.discovery import Record, RecordDeleted, RecordPut
from dynamo_core.errors import BackendProtocolError, DynamoError, UnavailableError
from dynamo_runtime._discovery.connection import StoreConnection
from dynamo_runtime._discovery.feed import Feed
from dynamo_runtime._discovery.followers import Followers
from dynamo_runtime._discovery.k8s_client import CONFIG_MAPS, SLICES, K8sClient, K8sError, as_discovery_error
from dynamo_runtime._discovery.k8s_objects import Seen, seen, selector, version

logger = structlog.get_logger(__name__)


class K8sWatches(Followers):
    """All watches of one client.

    Args:
        connection: What the client's parts share.
        client: Calls.
        scope: Label of the deployment.
        ready: Tells whether a pod may be shown.
    """

    def __init__(
        self, connection: StoreConnection, client: K8sClient, scope: str, ready: Callable[[str], bool]
    ) -> None:
        super().__init__(connection)
        self._client = client
        self._scope = scope
        self._ready = ready
        self._views: weakref.WeakKeyDictionary[Feed, dict[str, Seen]] = weakref.WeakKeyDictionary()

    async def listing(self, prefix: str) -> tuple[dict[str, Seen], int]:
        """Return what stands under a prefix, pods that are not ready included, and the version."""
        found, present = await self._client.list(CONFIG_MAPS, selector(self._scope, prefix))
        records = [each for each in map(self.readable, found) if each is not None]
        return {each.record.key: each for each in records if each.record.key.startswith(prefix)}, present

    def visible(self, view: Mapping[str, Seen]) -> dict[str, Record]:
        """Return the records of pods that are ready, in key order."""
        return {key: view[key].record for key in sorted(view) if self._ready(view[key].pod)}

    async def follow(self, feed: Feed, *, lost: bool) -> None:
        """Bring a feed up to date and keep it there; return when its version is too old.

        Raises:
            UnavailableError: when the server is lost.
            DynamoError: why the feed cannot go on.
        """
        try:
            view, present = await self.listing(feed.prefix)
            self._views[feed] = view
            self.begin_anew(feed, self.visible(view), present, lost=lost)
            changes = following(
                self._connection, self._client, CONFIG_MAPS, selector(self._scope, feed.prefix), present
            )
            async with contextlib.aclosing(changes) as events:
                async for event in events:
                    self._take(feed, view, event)
        except K8sError as error:
            if error.code != 410:
                raise as_discovery_error(error) from error

    def readiness_changed(self) -> None:
        """Show what has become ready and hide what no longer is."""
        for feed, view in list(self._views.items()):
            shown, now = dict(feed.records), self.visible(view)
            gone = [RecordDeleted(key, feed.revision) for key in shown if key not in now]
            come = [RecordPut(key, found.value, found.revision) for key, found in now.items() if key not in shown]
            feed.apply([*gone, *come], feed.revision)

    def _take(self, feed: Feed, view: dict[str, Seen], event: Mapping[str, Any]) -> None:
        found = self.readable(event["object"])
        if found is None or not found.record.key.startswith(feed.prefix):
            return
        record = found.record
        if event["type"] == "DELETED":
            view.pop(record.key, None)
            change: RecordPut | RecordDeleted = RecordDeleted(record.key, record.revision)
        else:
            view[record.key] = found
            change = RecordPut(record.key, record.value, record.revision)
        if self._ready(found.pod) or record.key in feed.records:
            feed.apply([change], record.revision)

    def readable(self, found: Mapping[str, Any]) -> Seen | None:
        """Return the record of an object; what others have labelled as ours is left out and counted."""
        try:
            return seen(found)
        except BackendProtocolError as error:
            self._connection.metrics.garbled(1)
            name = str((found.get("metadata") or {}).get("name", ""))
            logger.warning("discovery.garbled_record", object=name, error=error.message)
            return None


class PodReadiness:
    """Which pods of a service are ready, by its EndpointSlices.

    Args:
        connection: What the client's parts share.
        client: Calls.
        service: Name of the service; empty counts every pod as ready.
        changed: Called when a pod has become ready or no longer is.
    """

    def __init__(
        self, connection: StoreConnection, client: K8sClient, service: str, changed: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._client = client
        self._service = service
        self._changed = changed
        self._slices: dict[str, frozenset[str]] = {}
        self._version = 0

    def ready(self, pod: str) -> bool:
        """Whether a pod may be shown; records of processes outside any pod always are."""
        return not self._service or not pod or any(pod in pods for pods in self._slices.values())

    async def refresh(self) -> None:
        """Look at all slices."""
        if self._service:
            found, self._version = await self._client.list(SLICES, self._selector)
            self._replace({each["metadata"]["name"]: _ready_pods(each) for each in found})

    async def keep_following(self) -> None:
        """Follow the slices until cancelled; while the server is away, what was known last holds."""
        while self._service:
            try:
                await self._follow()
            except UnavailableError as error:
                await self._connection.note_failure(error)
                await self._connection.recovered.wait()
            except DynamoError as error:
                logger.warning("discovery.readiness_unknown", service=self._service, error=error.message)
                await self._connection.clock.sleep(self._connection.times.max_retry_interval_s)

    async def _follow(self) -> None:
        try:
            changes = following(self._connection, self._client, SLICES, self._selector, self._version)
            async with contextlib.aclosing(changes) as events:
                async for event in events:
                    name = event["object"]["metadata"]["name"]
                    pods = frozenset[str]() if event["type"] == "DELETED" else _ready_pods(event["object"])
                    self._replace({**self._slices, name: pods})
        except K8sError as error:
            if error.code != 410:
                raise as_discovery_error(error) from error
        await self._connection.reaching(self.refresh())

    def _replace(self, slices: dict[str, frozenset[str]]) -> None:
        before, self._slices = self._slices, {name: pods for name, pods in slices.items() if pods}
        if before != self._slices:
            self._changed()

    @property
    def _selector(self) -> str:
        return f"kubernetes.io/service-name={self._service}"


async def following(
    connection: StoreConnection, client: K8sClient, kind: str, labels: str, present: int
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield changes after a version, over watches that the server ends in between.

    Raises:
        K8sError: 410 if the version is too old.
        UnavailableError: when the server is lost.
    """
    while True:
        told = False
        async with contextlib.aclosing(client.watch(kind, labels, present)) as events:
            async for event in events:
                connection.note_reached()
                told = True
                present = version(event["object"])
                if event["type"] != "BOOKMARK":
                    yield event
        if not told:
            await connection.clock.sleep(connection.times.retry_interval_s)


def _ready_pods(found: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(
        str(endpoint["targetRef"]["name"])
        for endpoint in found.get("endpoints") or []
        # An endpoint that says nothing of itself counts as ready; so Kubernetes defines it.
        if endpoint.get("targetRef") and endpoint.get("conditions", {}).get("ready") is not False
    )
