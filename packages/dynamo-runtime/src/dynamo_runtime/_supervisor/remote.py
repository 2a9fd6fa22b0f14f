"""A supervisor in another process, as a scaling target: how a planner reaches the one it runs under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dynamo_core.component import ComponentContext
from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import EndpointId, new_request_id
from dynamo_core.planes import CallOptions
from dynamo_core.planning import PoolState
from dynamo_runtime._endpoints import call_any, require_instances
from dynamo_runtime._supervisor.messages import (
    ScaleRequest,
    SupervisorState,
    decode_message,
    scale_endpoint,
    state_endpoint,
)

CALL_TIMEOUT_S = 5.0


class RemoteSupervisor:
    """``ScalingTarget`` over the request plane.

    Args:
        context: Of the calling process.
        namespace: Namespace of the supervisor; the context's own if empty.
    """

    def __init__(self, context: ComponentContext, namespace: str = "") -> None:
        self._context = context
        self._namespace = namespace or context.namespace

    async def start(self) -> None:
        """Do nothing: each call finds the supervisor anew, so that it may be replaced."""

    async def state(self) -> Mapping[str, PoolState]:
        """See ``ScalingTarget.state``."""
        answer = await self._call(state_endpoint(self._namespace), msgspec.msgpack.encode({}))
        return decode_message(answer, SupervisorState).pools

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        """See ``ScalingTarget.scale``."""
        request = ScaleRequest(dict(replicas), decision_id)
        await self._call(scale_endpoint(self._namespace), msgspec.msgpack.encode(request))

    async def close(self) -> None:
        """Do nothing: there is no connection of its own."""

    async def _call(self, endpoint: EndpointId, payload: bytes) -> bytes:
        instances = await require_instances(self._context.discovery, endpoint)
        options = CallOptions(request_id=new_request_id(), deadline_s=CALL_TIMEOUT_S)
        return await call_any(self._context.request_plane, instances, payload, options)


def create_target(context: ComponentContext, options: Mapping[str, Any]) -> RemoteSupervisor:
    """Entry ``supervisor`` of ``dynamo_core.scaling_targets``; option ``namespace``.

    Raises:
        ConfigurationError: for an unknown option.
    """
    unknown = sorted(set(options) - {"namespace"})
    if unknown:
        raise ConfigurationError(f"scaling target supervisor takes no option {unknown[0]!r}; it takes namespace")
    return RemoteSupervisor(context, str(options.get("namespace", "")))
