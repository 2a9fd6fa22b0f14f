"""NIXL as a way for KV: on a fake whose calls and answers are those of NIXL 1.5 over UCX."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
from rig import PROMPT, Pair, received

from dynamo_core.errors import BackendProtocolError, ConfigurationError
from dynamo_worker._disagg import nixl, segments, transfer
from dynamo_worker._disagg.nixl import NixlPool, NixlReader, NixlSegment, load_agent
from dynamo_worker._metrics import REMOTE_PREFILLS_TOTAL


class FakeAgent:
    """Registers and reads memory of this process, and refuses what NIXL refuses."""

    states: tuple[str, ...] = ("DONE",)
    agents: dict[str, FakeAgent] = {}  # noqa: RUF012 - one network for all agents of a test

    def __init__(self, name: str, config: Any = None) -> None:
        self.name = name
        self.registered: dict[int, int] = {}
        self.remotes: set[bytes] = set()
        self.handles: dict[int, Any] = {}
        self.moved = 0
        self._numbers = itertools.count(1)
        self.agents[name] = self

    def register_memory(self, reg_list: Any, mem_type: str) -> Any:
        ((address, size, device, _),) = reg_list
        assert (mem_type, device) == ("DRAM", 0)
        self.registered[address] = size
        return ("registered", address)

    def deregister_memory(self, dereg_list: Any) -> None:
        del self.registered[dereg_list[1]]

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self.remotes.add(metadata)
        return metadata

    def remove_remote_agent(self, agent: bytes) -> None:
        self.remotes.discard(agent)

    def get_xfer_descs(self, descs: Any, mem_type: str) -> Any:
        ((address, size, device),) = descs
        assert (mem_type, device) == ("DRAM", 0)
        return address, size

    def initialize_xfer(self, operation: str, local: Any, remote: Any, remote_agent: bytes) -> int:
        assert operation == "READ"
        assert remote_agent in self.remotes
        self.require_inside(local)
        self.agents[remote_agent.decode()].require_inside(remote)
        handle = next(self._numbers)
        self.handles[handle] = (local, remote, list(self.states))
        return handle

    def transfer(self, handle: int) -> str:
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: int) -> str:
        local, remote, states = self.handles[handle]
        state = states.pop(0)
        if state == "DONE":
            ctypes.memmove(local[0], remote[0], local[1])
            self.moved += local[1]
        return state

    def release_xfer_handle(self, handle: int) -> None:
        del self.handles[handle]

    def require_inside(self, piece: tuple[int, int]) -> None:
        address, size = piece
        assert any(start <= address and address + size <= start + length for start, length in self.registered.items())


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeAgent]:
    agents: dict[str, FakeAgent] = {}
    monkeypatch.setattr(FakeAgent, "agents", agents)
    api: Any = ModuleType("nixl._api")
    api.nixl_agent = FakeAgent
    api.nixl_agent_config = lambda backends: {"backends": backends}
    monkeypatch.setitem(sys.modules, "nixl", ModuleType("nixl"))
    monkeypatch.setitem(sys.modules, "nixl._api", api)
    return agents


@pytest.mark.parametrize("form", ["pull", "bootstrap"])
async def test_the_output_equals_aggregated_serving(
    pair: Pair, network: dict[str, FakeAgent], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rig import engine_block_bytes

    for module in (segments, transfer):
        monkeypatch.setattr(module, "SLOT_BYTES", 2 * engine_block_bytes())
    await pair.start(
        prefill={"kv_nixl": True},
        decode={"kv_nixl": True, "kv_handoff": form, "remote_prefill_threshold_tokens": 0, "local_prefill": False},
    )
    for number in range(3):
        request = pair.request(f"r{number}", [token + number for token in PROMPT])
        reply = await pair.ask(pair.decode, request)
        assert (reply.error, reply.chunks[-1].usage.cached_tokens) == (None, 88)
        assert reply.tokens == await Pair(pair.process, pair.kit).aggregated(request)
    assert received(pair) == 66
    sender, receiver = network.values()
    assert (sender.moved, receiver.moved) == (0, 66 * engine_block_bytes())
    assert not receiver.remotes, "every sender is forgotten after its transfer"
    assert len(sender.registered) == len(receiver.registered) == 1, "registered memory is used again"
    await pair.decode.stop()
    await pair.prefill.stop()
    assert not sender.registered
    assert not receiver.registered


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_worker_without_nixl_gets_the_blocks_another_way(
    pair: Pair, network: dict[str, FakeAgent], side: str
) -> None:
    options = {side: {"kv_nixl": True}}
    await pair.start(
        prefill=options.get("prefill", {}), decode={"remote_prefill_threshold_tokens": 0, **options.get("decode", {})}
    )
    assert (await pair.ask(pair.decode, pair.request())).error is None
    assert received(pair) == 22
    assert [agent.moved for agent in network.values()] == [0]


async def test_a_failed_transfer_costs_a_computation(
    pair: Pair, network: dict[str, FakeAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeAgent, "states", ("ERR",))
    await pair.start(prefill={"kv_nixl": True}, decode={"kv_nixl": True, "remote_prefill_threshold_tokens": 0})
    reply = await pair.ask(pair.decode, pair.request())
    assert reply.tokens == await pair.aggregated(pair.request())
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="failed") == 1
    _, receiver = network.values()
    assert (receiver.handles, receiver.registered) == ({}, {}), "memory of a failed transfer is given up"


async def test_a_transfer_in_progress_is_looked_at_until_it_is_done(
    process: Any, network: dict[str, FakeAgent]
) -> None:
    sender, receiver = FakeAgent("a"), FakeAgent("b")
    FakeAgent.states = ("PROC", "PROC", "DONE")
    try:
        source, into = NixlSegment(sender, 8), NixlSegment(receiver, 4)
        source.view[:] = b"abcdefgh"
        reader = NixlReader(receiver, source.name, into, process.clock)
        reading = asyncio.ensure_future(reader.read(2, 4))
        await process.clock.advance(0.0003)
        assert not reading.done()
        await process.clock.advance(0.0003)
        assert bytes(reading.result()) == b"cdef"
        cancelled = asyncio.ensure_future(reader.read(0, 4))
        await process.clock.settle()
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert receiver.handles == {}, "cancelling aborts the transfer"
        with pytest.raises(BackendProtocolError, match="8 bytes, 4 fit"):
            await reader.read(0, 8)
        source.close()
        source.close()
        assert sender.registered == {}
    finally:
        FakeAgent.states = ("DONE",)


@pytest.mark.parametrize("name", ["nixl:", "nixl:12", "nixl:x:QQ==", "nixl:12:?"])
def test_a_name_that_cannot_be_read_is_refused(process: Any, name: str) -> None:
    agent: Any = FakeAgent("reader")
    agent.add_remote_agent = refuse_empty
    with pytest.raises(BackendProtocolError, match="cannot be read"):
        NixlReader(agent, name, NixlSegment(agent, 4), process.clock)


def refuse_empty(metadata: bytes) -> bytes:
    if not metadata:
        raise ValueError("no metadata")
    return metadata


def test_the_pool_is_bounded(network: dict[str, FakeAgent]) -> None:
    pool = NixlPool(FakeAgent("a"), 16, 2)
    first, second = pool.take(), pool.take()
    assert pool.take() is None
    assert first is not None
    assert second is not None
    pool.give_back(first, reusable=True)
    assert pool.take() is first


def test_without_nixl_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "_MODULES", ("no_such_nixl._api",))
    with pytest.raises(ConfigurationError, match="pip install nixl"):
        load_agent("a")


def test_nixl_that_does_not_start_is_told(network: dict[str, FakeAgent], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, config: Any) -> None:
        raise RuntimeError("no plugins")

    monkeypatch.setattr(sys.modules["nixl._api"], "nixl_agent", broken)
    with pytest.raises(ConfigurationError, match="no plugins"):
        load_agent("a")
