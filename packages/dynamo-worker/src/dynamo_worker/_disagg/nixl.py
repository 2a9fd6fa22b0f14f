"""KV over NIXL: slots in registered memory, which the receiver reads without the sender's processor."""

from __future__ import annotations

import base64
import binascii
import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, ConfigurationError
from dynamo_worker._disagg.segments import LendingPool

NIXL_HEADER = "x-dynamo-kv-nixl"
NIXL_NAME = "nixl:"
_MODULES = ("nixl._api", "nixl_cu13._api", "nixl_cu12._api")
_MEMORY = "DRAM"
_POLL_S = 0.0002


class NixlAgent(Protocol):
    """What is used of ``nixl_agent``; signatures as in NIXL 1.5."""

    def register_memory(self, reg_list: Sequence[tuple[int, int, int, str]], mem_type: str) -> Any:
        """Make memory readable by others: ``(address, bytes, device, name)``."""
        ...

    def deregister_memory(self, dereg_list: Any) -> Any:
        """Undo a registration."""
        ...

    def get_agent_metadata(self) -> bytes:
        """Return what others need to reach the memory that is registered now."""
        ...

    def add_remote_agent(self, metadata: bytes) -> Any:
        """Learn of another agent, or anew; return its name."""
        ...

    def remove_remote_agent(self, agent: Any) -> None:
        """Forget it."""
        ...

    def get_xfer_descs(self, descs: Sequence[tuple[int, int, int]], mem_type: str) -> Any:
        """Describe memory for a transfer: ``(address, bytes, device)``."""
        ...

    def initialize_xfer(self, operation: str, local_descs: Any, remote_descs: Any, remote_agent: Any) -> Any:
        """Prepare a transfer; return its handle."""
        ...

    def transfer(self, handle: Any) -> str:
        """Begin; return DONE, PROC or ERR."""
        ...

    def check_xfer_state(self, handle: Any) -> str:
        """Return DONE, PROC or ERR."""
        ...

    def release_xfer_handle(self, handle: Any) -> None:
        """Release a handle, and abort what it still does."""
        ...


def load_agent(name: str) -> NixlAgent:
    """Return an agent over UCX.

    Raises:
        ConfigurationError: if NIXL is not installed, or has no UCX here.
    """
    for module in _MODULES:
        try:
            api: Any = importlib.import_module(module)
        except ImportError:
            continue
        try:
            return cast("NixlAgent", api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"])))
        except Exception as error:  # its bindings raise what they like
            raise ConfigurationError(f"--kv-nixl: NIXL does not start here: {error}; leave --kv-nixl out") from error
    raise ConfigurationError("--kv-nixl needs NIXL; install it as its guide says (pip install nixl), or leave it out")


class NixlSegment:
    """Registered memory of this process.

    Args:
        agent: Where it is registered.
        size_bytes: Its length.
    """

    def __init__(self, agent: NixlAgent, size_bytes: int) -> None:
        self._agent = agent
        self._memory = np.zeros(size_bytes, dtype=np.uint8)
        self.address = self._memory.ctypes.data
        self.view = self._memory.data
        self._registered = agent.register_memory([(self.address, size_bytes, 0, "")], _MEMORY)

    @property
    def name(self) -> str:
        """What a receiver needs to read it."""
        return f"{NIXL_NAME}{self.address}:{base64.b64encode(self._agent.get_agent_metadata()).decode()}"

    def close(self) -> None:
        """Take it back. Idempotent."""
        registered, self._registered = self._registered, None
        if registered is not None:
            self._agent.deregister_memory(registered)


class NixlPool(LendingPool[NixlSegment]):
    """Registered memory, used again and again: registering costs more than a transfer.

    Args:
        agent: Where it is registered.
        size_bytes: Length of each.
        limit: Most of them.
    """

    def __init__(self, agent: NixlAgent, size_bytes: int, limit: int) -> None:
        super().__init__(limit)
        self.agent = agent
        self.size_bytes = size_bytes

    def make(self) -> NixlSegment:
        """Register another one."""
        return NixlSegment(self.agent, self.size_bytes)


class NixlReader:
    """Reads one sender's segment, a piece at a time.

    Args:
        agent: The receiver's.
        name: The segment's name, as the sender gave it.
        into: The receiver's memory, from which each piece must be used before the next is read.
        clock: Time between two looks at a transfer.

    Raises:
        BackendProtocolError: if the name cannot be read.
    """

    def __init__(self, agent: NixlAgent, name: str, into: NixlSegment, clock: Clock) -> None:
        address, _, metadata = name.removeprefix(NIXL_NAME).partition(":")
        try:
            self._address = int(address)
            self._remote = agent.add_remote_agent(base64.b64decode(metadata, validate=True))
        except (ValueError, binascii.Error) as error:
            raise BackendProtocolError(f"the sender's NIXL segment cannot be read: {error}") from error
        self._agent = agent
        self._into = into
        self._clock = clock

    async def read(self, start: int, size: int) -> memoryview:
        """Return a piece of the segment. Cancelling aborts the transfer.

        Raises:
            BackendProtocolError: if it is larger than the receiver's memory, or the transfer fails.
        """
        if size > len(self._into.view):
            raise BackendProtocolError(f"the sender's slots have {size} bytes, {len(self._into.view)} fit here")
        agent = self._agent
        local = agent.get_xfer_descs([(self._into.address, size, 0)], _MEMORY)
        remote = agent.get_xfer_descs([(self._address + start, size, 0)], _MEMORY)
        handle = agent.initialize_xfer("READ", local, remote, self._remote)
        try:
            state = agent.transfer(handle)
            while state == "PROC":
                await self._clock.sleep(_POLL_S)
                state = agent.check_xfer_state(handle)
        finally:
            agent.release_xfer_handle(handle)
        if state != "DONE":
            raise BackendProtocolError(f"a NIXL transfer ended as {state}")
        return self._into.view[:size]

    def close(self) -> None:
        """Forget the sender."""
        self._agent.remove_remote_agent(self._remote)
