"""G2, host memory that several processes of one machine share.

What is in the memory is written in the memory (``_shared_arena``). Each process keeps a copy of those books in plain
dictionaries and an eviction order of its own, and brings both up to date from the ring of changes before it relies on
them. The orders of two processes may differ: before a process evicts, it compares the block's last use by anyone with
the last use it knew of, and passes over what others used meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dynamo_core.clock import Clock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._tiers.arena import Pages
from dynamo_kvbm._tiers.base import Spill, require_pieces
from dynamo_kvbm._tiers.fork_guard import OwnersLock
from dynamo_kvbm._tiers.shared_arena import FREE, READY, SharedArena, described

_Fresh = tuple[BlockDescriptor, bytes | memoryview]


class SharedHostTier:
    """A ``BlockStore`` that processes share. The blocks outlive them: a worker that restarts finds them.

    Any thread of any process may call any method. A process that dies at any moment, by ``kill -9`` too, takes
    nothing with it but the blocks it was writing. One that is stopped inside a change makes the others wait a second,
    and then find nothing and store nothing until it goes on or dies. A child forked from its process makes a tier of
    its own: in the child, methods of this one raise ``ConflictError``.

    Args:
        folder: On a memory file system, such as ``/dev/shm/NAME`` or a hugetlbfs mount; the same for all processes.
        capacity_blocks: Slots, at least 1.
        block_bytes: Size of every block.
        fingerprint: What the blocks are of (model, layout, hash algorithm); memory of other blocks is refused.
        eviction: Makes the eviction order for a capacity.
        clock: Ends waits for the lock between processes.

    Raises:
        ConfigurationError: if sizes are below 1, or the folder cannot be used, has no room, or holds other blocks.
    """

    def __init__(
        self,
        folder: Path,
        capacity_blocks: int,
        block_bytes: int,
        *,
        fingerprint: str = "",
        eviction: Callable[[int], EvictionOrder] = LruOrder,
        clock: Clock | None = None,
    ) -> None:
        if capacity_blocks < 1 or block_bytes < 1:
            raise ConfigurationError(
                f"a host tier of {capacity_blocks} blocks of {block_bytes} bytes holds nothing; give both at least 1"
            )
        self._block_bytes = block_bytes
        self._arena = SharedArena(folder, capacity_blocks, block_bytes, fingerprint, clock)
        self._order = eviction(capacity_blocks)
        self._slots: dict[int, int] = {}
        self._blocks: list[BlockDescriptor | None] = [None] * capacity_blocks
        self._used = np.zeros(capacity_blocks, dtype=np.uint64)
        self._free: set[int] = set()
        self._reserved: set[int] = set()
        self._seen = (-1, 0)
        self._changes: dict[int, None] | None = {}
        self._spill: Spill | None = None
        self._closed = False
        self._lock = OwnersLock(self._arena.guard)
        with self._changing() as held:
            if not held:
                raise ConfigurationError(f"host_dir {folder} is locked by a process that stands still; end that one")
        self._changes = {}

    @property
    def tier(self) -> Tier:
        """``Tier.HOST``."""
        return Tier.HOST

    @property
    def capacity_blocks(self) -> int:
        """Slots in all."""
        return self._arena.capacity_blocks

    @property
    def used_blocks(self) -> int:
        """Slots that hold blocks."""
        return len(self._slots)

    @property
    def arena_bytes(self) -> int:
        """Bytes of all slots."""
        return self._arena.blocks.nbytes

    @property
    def pages(self) -> Pages:
        """Which pages the arena lies on."""
        return self._arena.pages

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is present."""
        with self._lock:
            self._catch_up()
            return [item in self._slots for item in sequence_hashes]

    def held(self) -> list[BlockDescriptor]:
        """Return every block held."""
        with self._lock:
            self._catch_up()
            return [block for block in self._blocks if block is not None]

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return the descriptors of those of these blocks that are present."""
        with self._lock:
            self._catch_up()
            found = [self._blocks[self._slots[item]] for item in sequence_hashes if item in self._slots]
            return [block for block in found if block is not None]

    def drain_changes(self) -> list[int] | None:
        """Return the blocks that other processes stored or removed since the last call; None if too many to note."""
        with self._lock:
            self._catch_up()
            changes, self._changes = self._changes, {}
            return None if changes is None else list(changes)

    def spill_to(self, receive: Spill) -> None:
        """Hand victims to ``receive`` as views of the arena. It runs under this process's lock, so it must not wait."""
        self._spill = receive

    def touch(self, prefix: Sequence[int]) -> None:
        """Mark the blocks of a prefix, root first, as used now; absent ones are ignored."""
        with self._lock:
            self._touch([item for item in prefix if item in self._slots])

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Store blocks and return what was evicted for them, oldest first.

        A block that finds every slot pinned is not stored; ``contains`` tells. Bytes are copied without the lock
        between processes.

        Raises:
            InvalidRequestError: if a piece has another size than the tier's blocks.
        """
        require_pieces(blocks, data, self._block_bytes)
        with self._lock:
            with self._changing() as held:
                if not held:
                    return []
                self._touch([block.sequence_hash for block in blocks if block.sequence_hash in self._slots])
                pairs = zip(blocks, data, strict=True)
                fresh = {block.sequence_hash: (block, piece) for block, piece in pairs}
                wanted = [pair for item, pair in fresh.items() if item not in self._slots]
                slots, victims = self._reserve([block for block, _ in wanted])
            if victims and self._spill is not None:
                self._spill([block for block, _ in victims], [self._arena.blocks[slot].data for _, slot in victims])
            self._fill(list(zip(wanted, slots, strict=False)))
        return [block.sequence_hash for block, _ in victims]

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return a copy of each block, None for those that are not there."""
        with self.lend(sequence_hashes) as views:
            copies = {item: bytes(view) for item, view in views.items()}
        return [copies.get(item) for item in sequence_hashes]

    @contextmanager
    def lend(self, sequence_hashes: Sequence[int]) -> Generator[dict[int, memoryview]]:
        """Lend views of those of these blocks that are present; no process reuses them while the context lasts."""
        held: dict[int, int] = {}
        with self._lock, self._changing() as locked:
            if locked:
                held = {item: self._slots[item] for item in sequence_hashes if item in self._slots}
                self._order.pin(held)
                self._arena.pin(list(held.values()))
        try:
            yield {item: self._arena.blocks[slot].data for item, slot in held.items()}
        finally:
            if not self._arena.guard.is_foreign:  # the pins are the parent's
                self._give_back(held)

    def _give_back(self, held: dict[int, int]) -> None:
        with self._lock:
            self._order.unpin(held)
            if not self._closed:
                self._arena.unpin(list(held.values()))

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Drop blocks, for all processes, that are not lent by any; absent ones are ignored."""
        with self._lock, self._changing() as held:
            for item in sequence_hashes if held else ():
                slot = self._slots.get(item)
                if slot is not None and not self._arena.pinned(slot):
                    self._arena.free(slot)

    def check_integrity(self) -> None:
        """Verify that the shared books and this process's copy agree.

        Raises:
            InternalError: with what is wrong.
        """
        with self._lock, self._changing() as held:
            if not held:
                raise InternalError("the lock between processes could not be had")
            self._order.check_integrity()
            states = self._arena.records["state"]
            ready = np.flatnonzero(states == READY).tolist()
            truth = {described(self._arena.records[slot]).sequence_hash: slot for slot in ready}
            if len(truth) != len(ready):
                raise InternalError("a block is in two slots")
            if truth != self._slots or set(np.flatnonzero(states == FREE).tolist()) != self._free:
                raise InternalError(f"{len(truth)} blocks are there, this process knows {len(self._slots)}")
            if len(self._order) != len(self._slots):
                raise InternalError("the eviction order holds other blocks than the slots")

    def close(self) -> None:
        """Leave; the blocks stay for the other processes and the next one.

        Idempotent, and nothing in a forked child.
        """
        if self._arena.guard.is_foreign:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._arena.close()

    @contextmanager
    def _changing(self) -> Generator[bool]:
        """Hold the lock between processes, with this process's books up to date at both ends."""
        if self._closed:
            yield False
            return
        with self._arena.locked() as held:
            if held:
                self._read_changes(own=False)
                for slot in self._reserved:  # an earlier call could not publish or free them
                    self._arena.free(slot)
                self._reserved.clear()
            yield held
            if held:
                self._read_changes(own=True)

    def _catch_up(self) -> None:
        if self._closed or (self._seen == self._arena.version and self._arena.settled):
            return
        with self._changing():
            pass

    def _reserve(self, fresh: Sequence[BlockDescriptor]) -> tuple[list[int], list[tuple[BlockDescriptor, int]]]:
        """Return slots for as many of the blocks as fit, and what was evicted for them; held parents stay."""
        if len(self._free) < len(fresh):
            self._arena.reclaim()
            self._read_changes(own=False)
        parents = {block.parent_hash for block in fresh}
        kept = [parent for parent in parents if parent is not None and parent in self._slots]
        self._order.pin(kept)
        slots: list[int] = []
        victims: list[tuple[BlockDescriptor, int]] = []
        while len(slots) < len(fresh):
            if self._free:
                slots.append(self._free.pop())
            elif (victim := self._evict()) is not None:
                victims.append(victim)
                slots.append(victim[1])
            else:
                break
            self._arena.reserve(slots[-1])
            self._reserved.add(slots[-1])
        self._order.unpin(kept)
        return slots, victims

    def _evict(self) -> tuple[BlockDescriptor, int] | None:
        """Take out the next leaf that no process pins and none used since this one last looked."""
        for _ in range(2 * len(self._slots)):
            victim = self._order.evict()
            if victim is None:
                return None
            slot = self._slots[victim]
            block = self._blocks[slot]
            assert block is not None
            used = self._arena.records["used"][slot]
            if used == self._used[slot] and not self._arena.pinned(slot):
                del self._slots[victim]
                self._blocks[slot] = None
                return block, slot
            self._used[slot] = used
            self._order.insert([(victim, block.parent_hash)])
        return None

    def _fill(self, taken: Sequence[tuple[_Fresh, int]]) -> None:
        """Copy blocks into reserved slots, then publish those that no other process has published meanwhile."""
        for (_, piece), slot in taken:
            self._arena.blocks[slot] = np.frombuffer(piece, dtype=np.uint8)
        if not taken:
            return
        slots = {slot for _, slot in taken}
        self._reserved -= slots
        with self._changing() as held:
            if not held:
                self._reserved |= slots
                return
            for (block, _), slot in taken:
                if block.sequence_hash in self._slots:
                    self._arena.free(slot)
                else:
                    self._arena.publish(slot, block)

    def _touch(self, present: Sequence[int]) -> None:
        self._order.touch(present)
        slots = [self._slots[item] for item in present]
        if slots and not self._closed:
            self._used[slots] = self._arena.records["used"][slots] = self._arena.tick()

    def _read_changes(self, *, own: bool) -> None:
        """Make this process's books agree with the shared ones."""
        changed = self._arena.changed_since(self._seen)
        self._seen = self._arena.version
        fresh: list[tuple[int, BlockDescriptor]] = []
        for slot in changed:
            record = self._arena.records[slot]
            block = described(record) if record["state"] == READY else None
            before = self._blocks[slot]
            if before is not None and before != block:
                self._forget(before, slot, own=own)
            if block is not None and before != block:
                fresh.append((slot, block))
            self._used[slot] = record["used"]
            (self._free.add if record["state"] == FREE else self._free.discard)(slot)
        # A block may have moved to an earlier slot, so all that went must go before anything comes.
        for slot, block in fresh:
            self._blocks[slot] = block
            self._slots[block.sequence_hash] = slot
            self._note(block, own=own)
        fresh.sort(key=lambda pair: self._used[pair[0]])
        for chain in _chains([block for _, block in fresh]):
            self._order.insert(chain)

    def _forget(self, block: BlockDescriptor, slot: int, *, own: bool) -> None:
        self._blocks[slot] = None
        del self._slots[block.sequence_hash]
        self._order.discard(block.sequence_hash)
        self._note(block, own=own)

    def _note(self, block: BlockDescriptor, *, own: bool) -> None:
        if own or self._changes is None:
            return
        self._changes[block.sequence_hash] = None
        if len(self._changes) > 2 * self.capacity_blocks:
            self._changes = None


def _chains(blocks: Sequence[BlockDescriptor]) -> Generator[list[tuple[int, int | None]]]:
    """Yield runs of blocks in which each continues the one before, as an order takes them in."""
    chain: list[tuple[int, int | None]] = []
    for block in blocks:
        if chain and block.parent_hash != chain[-1][0]:
            yield chain
            chain = []
        chain.append((block.sequence_hash, block.parent_hash))
    if chain:
        yield chain
