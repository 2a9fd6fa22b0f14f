"""Admin operations of a worker, as the status server offers them under ``/engine/<name>``."""

from __future__ import annotations

from typing import Any, Protocol, cast

from dynamo_core.component import AdminRoute
from dynamo_core.engine import Engine, SupportsCacheControl, SupportsControls, SupportsSleep
from dynamo_core.errors import ConflictError, InvalidRequestError, UnsupportedOperationError
from dynamo_worker._lora_records import LoraRecords

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
        loras: Its adapters, if it can have some.
    """

    def __init__(
        self,
        table: dict[str, AdminRoute],
        *,
        instance: str,
        worker: Drainable,
        engine: Engine,
        loras: LoraRecords | None = None,
    ) -> None:
        self._asleep = False
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
        if isinstance(engine, SupportsSleep):
            offered |= {"sleep": self._sleep, "wake": self._wake}
        if loras is not None:
            offered |= {"load_lora": loras.load, "unload_lora": loras.unload, "list_loras": loras.list}
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
        if self._asleep:
            raise ConflictError("the engine sleeps; use wake instead of resume")
        await self._worker.resume()
        return self._worker.status()

    async def _sleep(self, arguments: dict[str, Any]) -> dict[str, Any]:
        level = _number(arguments, "level", 1.0)
        await self._worker.pause(_number(arguments, "timeout_s", DEFAULT_DRAIN_TIMEOUT_S))
        try:
            await cast("SupportsSleep", self._engine).sleep(int(level))
        except BaseException:
            await self._worker.resume()
            raise
        self._asleep = True
        return {**self._worker.status(), "sleep_level": int(level)}

    async def _wake(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._asleep:
            await cast("SupportsSleep", self._engine).wake()
            self._asleep = False
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
        raise InvalidRequestError(f"{name} is {value!r}; give a number, 0 or more", param=name)
    return float(value)
