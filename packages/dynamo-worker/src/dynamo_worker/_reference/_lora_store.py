"""Which adapters are loaded, and who uses them. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from dynamo_core.errors import CapacityExhaustedError, ConflictError, InvalidRequestError, NotFoundError
from dynamo_core.requests import GenerateRequest
from dynamo_worker._reference._config import ModelConfig
from dynamo_worker._reference._lora import LoraAdapter, load_adapter

MAX_ADAPTERS = 256


class LoraStore:
    """Adapters by name.

    A name stands for one content as long as the engine lives: blocks computed with it may lie in caches anywhere, and
    are found by the name.

    Args:
        config: The model that they adapt.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._adapters: dict[str, LoraAdapter] = {}
        self._digests: dict[str, str] = {}
        self._users: Counter[str] = Counter()
        self._freed: dict[str, asyncio.Event] = {}

    @property
    def names(self) -> list[str]:
        """Names of loaded adapters, in order of the alphabet."""
        return sorted(self._adapters)

    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter.

        Raises:
            ConflictError: if the name is taken, or stood for other weights before.
            NotFoundError: if the folder has no adapter.
            InvalidRequestError: if it does not fit the model.
            CapacityExhaustedError: if there are too many.
        """
        if not name:
            raise InvalidRequestError("give the adapter a name", param="lora_name")
        self._require_free(name)
        if len(self._digests) >= MAX_ADAPTERS and name not in self._digests:
            raise CapacityExhaustedError(f"{MAX_ADAPTERS} adapters were loaded, which is the limit; restart the worker")
        adapter = await asyncio.to_thread(load_adapter, name, folder, self._config)
        self._require_free(name)
        if self._digests.setdefault(name, adapter.digest) != adapter.digest:
            raise ConflictError(
                f"the name {name!r} stood for other weights, whose KV may still be cached; load these under a new name",
                param="lora_name",
            )
        self._adapters[name] = adapter

    async def unload(self, name: str) -> None:
        """Take an adapter out and wait for the requests that use it. Cancelling ends the wait, not the unloading.

        Raises:
            NotFoundError: for an unknown name.
        """
        if self._adapters.pop(name, None) is None:
            raise NotFoundError(
                f"no adapter is named {name!r}; loaded: {', '.join(self.names) or 'none'}", param="lora_name"
            )
        if self._users[name]:
            await self._freed.setdefault(name, asyncio.Event()).wait()

    def resolve(self, request: GenerateRequest) -> str:
        """Return the adapter's name that a request asks for, by hint or as its model; empty for the base model."""
        return request.routing.lora or (request.model if request.model in self._adapters else "")

    def acquire(self, name: str) -> LoraAdapter | None:
        """Return an adapter in use until released; None for the base model.

        Raises:
            NotFoundError: for an unknown name.
        """
        if not name:
            return None
        adapter = self._adapters.get(name)
        if adapter is None:
            raise NotFoundError(
                f"no adapter is named {name!r}; loaded: {', '.join(self.names) or 'none'}", param="lora"
            )
        self._users[name] += 1
        return adapter

    def release(self, adapter: LoraAdapter | None) -> None:
        """Note that a request has ended."""
        if adapter is None:
            return
        self._users[adapter.name] -= 1
        if not self._users[adapter.name]:
            del self._users[adapter.name]
            freed = self._freed.pop(adapter.name, None)
            if freed is not None:
                freed.set()

    def _require_free(self, name: str) -> None:
        if name in self._adapters:
            raise ConflictError(f"the adapter name {name!r} is taken; unload it first", param="lora_name")
