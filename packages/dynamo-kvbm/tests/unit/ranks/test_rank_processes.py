"""Leader and ranks in processes of their own: plans and reports over TCP, device memory in files that the test sees."""

from __future__ import annotations

import contextlib
import mmap
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from dynamo_core.kv import BlockDescriptor, BlockLayout, TierChange
from dynamo_kvbm._transfer.layout import shard_layout
from dynamo_kvbm.connector_sdk import PlanOutcome, RankLeader, RankPlan, RankReport

WHOLE = BlockLayout(num_layers=2, block_size=4, kv_heads=4, head_dim=4)
RANKS = 2
DEVICE_BLOCKS = 6
SLOTS = 4
DEADLINE_S = 30.0
SIZE = struct.Struct("<I")

RANK = """
import mmap, socket, struct, sys
import msgspec
import numpy as np
from dynamo_core.kv import BlockLayout
from dynamo_kvbm.connector_sdk import ArenaBlockAccess, ArenaLayout, KvArena, RankPlan, RankWorker

rank, port, path, shard, blocks, slots = sys.argv[1:]
layout = ArenaLayout(msgspec.json.decode(shard, type=BlockLayout), int(blocks))
with open(path, "r+b") as file:
    memory = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.float32)
device = KvArena.from_dlpack(layout, memory.reshape(layout.num_blocks, *layout.block.shape))
worker = RankWorker(int(rank), ArenaBlockAccess(device), int(slots))
stream = socket.create_connection(("127.0.0.1", int(port))).makefile("rwb")
while size := stream.read(4):
    plan = msgspec.msgpack.decode(stream.read(struct.unpack("<I", size)[0]), type=RankPlan)
    report = msgspec.msgpack.encode(worker.execute(plan))
    stream.write(struct.pack("<I", len(report)) + report)
    stream.flush()
"""


class Rank:
    """A rank's process, and what a scheduler has of it: a connection and, here, sight of its device."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        shard = shard_layout(WHOLE, rank, RANKS)
        path = folder / f"device.{rank}"
        if not path.exists():
            path.write_bytes(bytes(DEVICE_BLOCKS * shard.block_bytes))
        with path.open("r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.float32)
        self.device: NDArray[np.float32] = memory.reshape(DEVICE_BLOCKS, *shard.shape)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(DEADLINE_S)
            arguments = [rank, server.getsockname()[1], path, msgspec.json.encode(shard).decode(), DEVICE_BLOCKS, SLOTS]
            self.process = subprocess.Popen([sys.executable, "-c", RANK, *map(str, arguments)])
            connection, _ = server.accept()
        connection.settimeout(DEADLINE_S)
        self._stream = connection.makefile("rwb")
        connection.close()  # the stream keeps it open

    def send(self, plan: RankPlan) -> None:
        data = msgspec.msgpack.encode(plan)
        self._stream.write(SIZE.pack(len(data)) + data)
        self._stream.flush()

    def report(self) -> RankReport | None:
        """Return the rank's next report; None once it is dead."""
        size = self._stream.read(SIZE.size)
        if len(size) < SIZE.size:
            return None
        return msgspec.msgpack.decode(self._stream.read(SIZE.unpack(size)[0]), type=RankReport)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.close()
        self.process.wait(DEADLINE_S)


class Scheduler:
    """A leader and the connections to its ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.present: set[int] = set()
        self.leader = RankLeader(SLOTS, RANKS, on_change=self.on_change)
        self.ranks = [Rank(rank, folder) for rank in range(RANKS)]

    def on_change(self, change: TierChange) -> None:
        self.present |= {block.sequence_hash for block in change.stored}
        self.present -= set(change.removed)

    def compute(self, item: int, block_id: int) -> None:
        heads = WHOLE.kv_heads // RANKS
        for number, rank in enumerate(self.ranks):
            rank.device[block_id] = content(item)[..., number * heads : (number + 1) * heads, :]

    def wipe(self) -> None:
        for rank in self.ranks:
            rank.device[:] = 0

    def holds(self, item: int, block_id: int) -> bool:
        whole = np.concatenate([rank.device[block_id] for rank in self.ranks], axis=-2)
        return bool(np.array_equal(whole, content(item)))

    def step(self) -> list[PlanOutcome]:
        """Carry a plan to every rank; tell the leader of reports and of ranks that are dead."""
        plan = self.leader.take_plan()
        assert plan is not None
        for rank in self.ranks:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                rank.send(plan)
        outcomes: list[PlanOutcome] = []
        for rank in self.ranks:
            report = rank.report()
            if report is None:
                outcomes += self.leader.lose_rank(rank.rank)
            elif (outcome := self.leader.on_report(report)) is not None:
                outcomes.append(outcome)
        return outcomes


def chain(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(item, 0, hashes[i - 1] if i else None, i) for i, item in enumerate(hashes)]


def content(item: int) -> NDArray[np.float32]:
    return np.random.default_rng(item).standard_normal(WHOLE.shape, dtype=np.float32)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    made = Scheduler(tmp_path)
    yield made
    for rank in made.ranks:
        rank.close()


def test_shards_come_back_to_every_process_and_make_the_whole_block(scheduler: Scheduler) -> None:
    leader = scheduler.leader
    for block_id, item in enumerate((1, 2)):
        scheduler.compute(item, block_id)
    leader.offload(chain(1, 2), [0, 1])
    assert scheduler.step() == [PlanOutcome(1, (1, 2))]
    scheduler.wipe()
    assert leader.match([1, 2, 3]).blocks == 2
    assert leader.onboard([1, 2], [5, 4]) == 2
    assert scheduler.step() == [PlanOutcome(2)]
    assert scheduler.holds(1, 5)
    assert scheduler.holds(2, 4)
    leader.check_integrity()


def test_kill_9_of_a_rank_takes_all_blocks_until_it_is_back(scheduler: Scheduler) -> None:
    leader = scheduler.leader
    scheduler.compute(1, 0)
    leader.offload(chain(1), [0])
    scheduler.step()
    assert scheduler.present == {1}
    leader.onboard([1], [3])
    scheduler.ranks[1].kill()
    (outcome,) = scheduler.step()
    assert outcome.not_onboarded == (1,), "the engine computes it again on every rank"
    assert (scheduler.present, leader.match([1]).blocks) == (set(), 0)
    assert leader.offload(chain(2), [0]) == []
    scheduler.ranks[1].close()
    scheduler.ranks[1] = Rank(1, scheduler.folder)
    leader.join_rank(1)
    scheduler.compute(2, 0)
    leader.offload(chain(2), [0])
    scheduler.step()
    scheduler.wipe()
    leader.onboard([2], [4])
    scheduler.step()
    assert scheduler.holds(2, 4)
    assert scheduler.present == {2}
    leader.check_integrity()


def test_a_rank_that_came_back_without_a_word_serves_no_foreign_bytes(scheduler: Scheduler) -> None:
    leader = scheduler.leader
    scheduler.compute(1, 0)
    leader.offload(chain(1), [0])
    scheduler.step()
    scheduler.ranks[0].kill()
    scheduler.ranks[0].close()
    scheduler.ranks[0] = Rank(0, scheduler.folder)
    leader.onboard([1], [3])
    assert scheduler.step() == [PlanOutcome(2, (), (1,))]
    assert scheduler.present == set()
