"""Endpoints by name: serve one and announce it, find who serves one, call it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import structlog

from dynamo_core.cards import EndpointTypes
from dynamo_core.discovery import INSTANCES_PREFIX, Discovery, Instance, Lease, Record, endpoint_prefix
from dynamo_core.errors import BackendProtocolError, ConflictError, DynamoError, UnavailableError
from dynamo_core.ids import EndpointId, new_instance_id
from dynamo_core.planes import DEFAULT_CALL_OPTIONS, CallOptions, RequestHandler, RequestPlane, ServedEndpoint
from dynamo_core.streams import call_unary
from dynamo_core.wire import INSTANCE

logger = structlog.get_logger(__name__)

RAW = EndpointTypes(request="", response="")
"""Types of an endpoint whose payloads and items are plain bytes."""


NEVER_BEGAN_REASONS = frozenset(
    {
        "transport.cannot_connect",
        "backend.worker_unavailable",
        "backend.draining",
        "capacity.worker_overloaded",
    }
)
"""Reasons with which a plane refuses a call that no handler has seen."""


def never_began(error: DynamoError) -> bool:
    """Whether a failed call can be made elsewhere whatever it does, since no handler has seen it.

    A call that was lost on its way (``transport.disconnected``) may have been served: whether it can be made again is
    for its caller to say.
    """
    return error.reason in NEVER_BEGAN_REASONS


@dataclass(frozen=True)
class AnnouncedEndpoint:
    """An endpoint that this process serves and that peers can find."""

    instance: Instance
    served: ServedEndpoint
    discovery: Discovery

    async def drain(self, timeout_s: float) -> bool:
        """Leave discovery, refuse new calls, finish running ones; return whether all ended in time."""
        await self.discovery.delete(self.instance.key)
        return await self.served.drain(timeout_s)

    async def close(self) -> None:
        """Leave discovery and end what still runs. Idempotent."""
        await self.discovery.delete(self.instance.key)
        await self.served.close()


async def announce_endpoint(
    discovery: Discovery,
    plane: RequestPlane,
    lease: Lease,
    endpoint: EndpointId,
    handler: RequestHandler,
    *,
    types: EndpointTypes = RAW,
) -> AnnouncedEndpoint:
    """Serve an endpoint and register it as a new instance under the lease."""
    served = await plane.serve(endpoint, handler, schema=types.request)
    instance = Instance(
        endpoint=endpoint,
        instance_id=new_instance_id(),
        address=served.address,
        types=types,
        device_type="cpu",
        metadata={"host": platform.node(), "pid": str(os.getpid())},
    )
    try:
        await discovery.put(instance.key, INSTANCE.encode(instance), lease=lease)
    except BaseException:
        await served.close()
        raise
    return AnnouncedEndpoint(instance, served, discovery)


async def find_instances(discovery: Discovery, endpoint: EndpointId) -> list[Instance]:
    """Return who serves an endpoint, by instance id."""
    return readable_instances(await discovery.list(INSTANCES_PREFIX + endpoint_prefix(endpoint)))


def readable_instances(records: Iterable[Record]) -> list[Instance]:
    """Return the instances of records; one that cannot be read must not hide the others and is only logged."""
    found: list[Instance] = []
    for record in records:
        try:
            found.append(INSTANCE.decode(record.value))
        except BackendProtocolError as error:
            logger.warning("endpoints.garbled_instance", key=record.key, error=error.message)
    return found


async def require_instances(discovery: Discovery, endpoint: EndpointId) -> list[Instance]:
    """Return who serves an endpoint.

    Raises:
        UnavailableError: if nobody does.
    """
    found = await find_instances(discovery, endpoint)
    if not found:
        raise UnavailableError(
            f"nobody serves {endpoint}; start one, or look with: dynamo instances", reason="backend.worker_unavailable"
        )
    return found


async def call_any(
    plane: RequestPlane, instances: Sequence[Instance], payload: bytes, options: CallOptions = DEFAULT_CALL_OPTIONS
) -> bytes:
    """Call the first instance that takes the call and return the answer's only item. Cancelling kills the call.

    Raises:
        UnavailableError: if none can be reached, or all of them drain.
        CapacityExhaustedError: if all that can be reached are overloaded.
        DynamoError: what the handler raised.
    """
    last: DynamoError | None = None
    for instance in instances:
        try:
            return await call_unary(plane, instance.address, instance.endpoint, payload, options)
        except DynamoError as error:
            if not never_began(error):
                raise
            last = error
    raise last or UnavailableError("there is no instance to call", reason="backend.worker_unavailable")


def pick_instance(instances: list[Instance], instance_id: int | None) -> Instance:
    """Return the instance with that id, or the first one if no id is given.

    Raises:
        ConflictError: if no instance has the id.
    """
    if instance_id is None:
        return instances[0]
    for instance in instances:
        if instance.instance_id == instance_id:
            return instance
    known = ", ".join(format(instance.instance_id, "x") for instance in instances)
    raise ConflictError(f"instance {instance_id:x} does not serve {instances[0].endpoint}; there are {known}")
