"""Adapters by name, as vLLM numbers them."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dynamo_core.errors import ConflictError, NotFoundError
from dynamo_core.requests import GenerateRequest


class LoraNames:
    """The adapters that were loaded, and the numbers vLLM knows them by."""

    def __init__(self) -> None:
        self._loras: dict[str, Any] = {}
        self._last = 0

    @property
    def names(self) -> list[str]:
        """Names, sorted."""
        return sorted(self._loras)

    async def load(self, name: str, path: str, add: Callable[[Any], Awaitable[Any]]) -> None:
        """Load an adapter.

        Raises:
            ConflictError: if the name is taken.
            NotFoundError: if the folder has no adapter.
        """
        if name in self._loras:
            raise ConflictError(f"the adapter name {name!r} is taken; unload it first", param="lora_name")
        if not (Path(path) / "adapter_config.json").is_file():
            raise NotFoundError(f"{path} has no LoRA adapter", param="path")
        self._last += 1
        lora = importlib.import_module("vllm.lora.request").LoRARequest(name, self._last, path)
        await add(lora)
        self._loras[name] = lora

    async def unload(self, name: str, remove: Callable[[int], Awaitable[Any]]) -> None:
        """Unload an adapter.

        Raises:
            NotFoundError: if no adapter has the name.
        """
        lora = self._loras.pop(name, None)
        if lora is None:
            raise NotFoundError(f"no adapter is named {name!r}", param="lora_name")
        await remove(lora.lora_int_id)

    def of(self, request: GenerateRequest) -> Any:
        """Return vLLM's record of the adapter that a request names; None if it names none.

        Raises:
            NotFoundError: if that adapter is not loaded.
        """
        name = request.routing.lora or (request.model if request.model in self._loras else "")
        if not name:
            return None
        if name not in self._loras:
            raise NotFoundError(f"no adapter is named {name!r}", param="lora")
        return self._loras[name]
