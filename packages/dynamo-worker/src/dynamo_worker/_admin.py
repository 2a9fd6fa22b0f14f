"""Admin operations of a worker, as the status server offers them under ``/engine/<name>``."""

from __future__ import annotations

from typing import Any, Protocol, cast

from dynamo_core.component import AdminRoute
from dynamo_core.engine import Engine, SupportsCacheControl, SupportsControls
from dynamo_core.errors import InvalidRequestError, UnsupportedOperationError

DEFAULT_DRAIN_TIMEOUT_S = 30.0


class Drainable(Protocol):
    """What the operations need of a worker."""

    async def pause(self, timeout_s: float) -> None:
        """Leave discovery and finish running requests."""
        ...

    async def resume(self) -> None:
        """Serve again."""
        ...

    def status(self) -> dict[str, Any]:
        """Return the state for people and operators."""
        ...


class AdminRoutes:
    """Adds a worker's operations to the process's table and takes them out again.

    A process that hosts several workers has the first one's under plain names and the others' under
    ``<instance id>/<name>``.

    Args:
        table: The process's operations.
        instance: Instance id as hex.
        worker: The worker.
        engine: Its engine; operations it cannot do are not offered.
    """

    def __init__(self, table: dict[str, AdminRoute], *, instance: str, worker: Drainable, engine: Engine) -> None:
        self._table = table
        self._worker = worker
        self._engine = engine
        offered: dict[str, AdminRoute] = {
            "drain": self._drain,
            "resume": self._resume,
            "status": self._status,
            "controls": self._controls,
            "control": self._control,
        }
        if isinstance(engine, SupportsCacheControl):
            offered["clear_kv_blocks"] = self._clear_kv_blocks
        prefix = f"{instance}/" if any(name in table for name in offered) else ""
        self._mine = {prefix + name: route for name, route in offered.items()}
        table.update(self._mine)

    def remove(self) -> None:
        """Take the operations out. Idempotent."""
        for name in self._mine:
            self._table.pop(name, None)
        self._mine = {}

    async def _drain(self, arguments: dict[str, Any]) -> dict[str, Any]:
        await self._worker.pause(_number(arguments, "timeout_s", DEFAULT_DRAIN_TIMEOUT_S))
        return self._worker.status()

    async def _resume(self, arguments: dict[str, Any]) -> dict[str, Any]:
        await self._worker.resume()
        return self._worker.status()

    async def _status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._worker.status()

    async def _clear_kv_blocks(self, arguments: dict[str, Any]) -> dict[str, Any]:
        engine = cast("SupportsCacheControl", self._engine)
        return {"cleared_blocks": await engine.clear_kv_blocks()}

    async def _controls(self, arguments: dict[str, Any]) -> dict[str, Any]:
        engine = self._engine
        return {"controls": sorted(engine.controls()) if isinstance(engine, SupportsControls) else []}

    async def _control(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(self._engine, SupportsControls):
            raise UnsupportedOperationError(f"engine {type(self._engine).__name__} has no controls")
        name = arguments.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidRequestError("give the control's name as a string", param="name")
        given: object = arguments.get("arguments", {})
        if not isinstance(given, dict):
            raise InvalidRequestError("give the control's arguments as an object", param="arguments")
        return await self._engine.control(name, cast("dict[str, Any]", given))


def _number(arguments: dict[str, Any], name: str, default: float) -> float:
    value: object = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise InvalidRequestError(f"{name} is {value!r}; give seconds, 0 or more", param=name)
    return float(value)
