"""Adapters of a worker as models of their own: a loaded adapter has a card, under the adapter's name as suffix."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from dynamo_core.cards import LoraInfo
from dynamo_core.discovery import ModelRecord
from dynamo_core.engine import SupportsLora
from dynamo_core.errors import InvalidRequestError
from dynamo_worker._registration import Registration


class LoraRecords:
    """Loads and unloads adapters, and keeps discovery in step.

    Args:
        engine: Has the adapters.
        base: Record of the base model.
        registration: The worker's records.
    """

    def __init__(self, engine: SupportsLora, base: ModelRecord, registration: Registration) -> None:
        self._engine = engine
        self._base = base
        self._registration = registration
        self._order = asyncio.Lock()

    async def publish_loaded(self) -> None:
        """Publish the adapters that the engine has from its start."""
        for name in await self._engine.list_loras():
            await self._registration.publish(self._record(name))

    async def load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Load the adapter ``lora_name`` from ``source`` (a folder or ``file://`` URL) and publish it."""
        name, path = _text(arguments, "lora_name"), _local_path(_text(arguments, "source"))
        async with self._order:
            await self._engine.load_lora(name, path)
            await self._registration.publish(self._record(name))
        return {"loaded": name}

    async def unload(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take the adapter ``lora_name`` out of discovery, and unload it once no request uses it."""
        name = _text(arguments, "lora_name")
        async with self._order:
            await self._registration.withdraw(self._record(name).key)
            await self._engine.unload_lora(name)
        return {"unloaded": name}

    async def list(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the names of loaded adapters."""
        return {"loras": await self._engine.list_loras()}

    def _record(self, name: str) -> ModelRecord:
        base = self._base
        card = msgspec.structs.replace(base.card, name=name, aliases=(), lora=LoraInfo(name, base.card.name))
        return ModelRecord(base.endpoint, base.instance_id, card, suffix=name)


def _text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{name} is {value!r}; give a string that is not empty", param=name)
    return value


def _local_path(source: str) -> str:
    parts = urlsplit(source)
    if not parts.scheme:
        return source
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise InvalidRequestError(
            f"source {source!r} is not a folder or file:// URL of this machine; download the adapter first",
            param="source",
        )
    return unquote(parts.path)
