"""The event-fed KV index: which worker holds which block of a sequence, in which tier.

Blocks are keyed by their chained sequence hash, which names a position and everything before it, so one dictionary
per tier maps a hash to the bit set of its holders. Where a worker's prefixes are closed, "holds the block at position
i" can only turn from true to false along a prompt; the holders' cut points are then found by bisection, at a cost of
O(log depth x distinct cut points) whatever the number of workers. Workers with holes are walked block by block.

Values here do no I/O and know no order of events; ``_indexer`` does.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from itertools import repeat

import xxhash

from dynamo_core.enums import Tier
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import HASH_BYTES, SEED, chain_hashes, unpack_hashes
from dynamo_router._match import TIERS, Match
from dynamo_router._search import closed_depths
from dynamo_router._shelf import Shelf

DEFAULT_MAX_BLOCKS = 8_000_000


class Applied(enum.Enum):
    """What became of an event."""

    OK = "ok"
    IGNORED = "ignored"
    UNKNOWN_BLOCK = "unknown_block"
    UNKNOWN_PARENT = "unknown_parent"
    INVALID = "invalid"
    OVER_CAPACITY = "over_capacity"


class BlockIndex:
    """Index over all (worker, dp rank) pairs and tiers. Not thread-safe.

    Args:
        max_blocks: Most (worker, tier, block) entries. Beyond it new blocks are dropped from the tail of their chain,
            so answers stay true and become shorter.
    """

    def __init__(self, *, max_blocks: int = DEFAULT_MAX_BLOCKS) -> None:
        self.max_blocks = max_blocks
        self.dropped_blocks = 0
        self._total = 0
        self._holders: tuple[dict[int, int], ...] = tuple({} for _ in TIERS)
        self._slots: dict[WorkerId, int] = {}
        self._workers: list[WorkerId | None] = []
        self._shelves: list[tuple[Shelf, ...]] = []
        self._named: int = 0
        self._open: int = 0
        self._lossy: int = 0

    def __len__(self) -> int:
        return self._total

    @property
    def distinct_blocks(self) -> int:
        """Distinct blocks on any device."""
        return len(self._holders[0])

    def slot(self, worker: WorkerId) -> int:
        """Return the worker's slot, giving it one if it is new."""
        slot = self._slots.get(worker)
        if slot is not None:
            return slot
        slot = next((free for free, owner in enumerate(self._workers) if owner is None), len(self._workers))
        if slot == len(self._workers):
            self._workers.append(worker)
            self._shelves.append(tuple(Shelf() for _ in TIERS))
        else:
            self._workers[slot] = worker
            self._shelves[slot] = tuple(Shelf() for _ in TIERS)
        self._slots[worker] = slot
        return slot

    def workers(self) -> list[WorkerId]:
        """Return the workers that have a slot."""
        return list(self._slots)

    def worker_at(self, slot: int) -> WorkerId | None:
        """Return whose slot it is."""
        return self._workers[slot]

    def blocks_of(self, worker: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        """Return how many blocks a worker holds in a tier."""
        slot = self._slots.get(worker)
        return 0 if slot is None else len(self._shelves[slot][TIERS.index(tier)])

    def shelves(self, worker: WorkerId) -> Sequence[Shelf]:
        """Return what a worker holds by tier, to read."""
        return self._shelves[self.slot(worker)]

    def hold(
        self, worker: WorkerId, tier: Tier, entries: Iterable[tuple[int, int | None, int]], *, named: bool
    ) -> None:
        """Hold blocks given as ``(sequence hash, parent, engine hash)``, up to the memory bound."""
        slot = self.slot(worker)
        if named:
            self._use_names(slot)
        for key, parent, name in entries:
            if self._total >= self.max_blocks:
                self.dropped_blocks += 1
                self._lossy |= 1 << slot
            else:
                self._place(slot, TIERS.index(tier), parent, [key], [name])

    def is_lossy(self, worker: WorkerId) -> bool:
        """Whether blocks of this worker were dropped for lack of room since it was last cleared."""
        slot = self._slots.get(worker)
        return slot is not None and bool(self._lossy >> slot & 1)

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker and free its slot."""
        slot = self._slots.get(worker)
        if slot is not None:
            self.clear(worker)
            bit = 1 << slot
            self._named &= ~bit
            self._workers[slot] = None
            del self._slots[worker]

    def clear(self, worker: WorkerId, tier: Tier | None = None) -> None:
        """Forget what a worker holds, in one tier or in all."""
        slot = self.slot(worker)
        for rank, kind in enumerate(TIERS):
            if tier is None or kind is tier:
                self._clear_shelf(slot, rank)
        if tier is None:
            self._lossy &= ~(1 << slot)

    def apply(self, worker: WorkerId, event: KvEvent) -> Applied:
        """Apply one event.

        An event whose parent the worker does not hold is still placed if its engine hashes are sequence hashes;
        otherwise its position is unknown and it is refused.
        """
        if type(event) is BlockStored:
            return self._store(self.slot(worker), event)
        if type(event) is BlockRemoved:
            return self._remove(self.slot(worker), event)
        if type(event) is BlocksCleared:
            if event.tier is not None and event.tier not in TIERS:
                return Applied.IGNORED
            self.clear(worker, event.tier)
            return Applied.OK
        return Applied.IGNORED

    def match(self, hashes: Sequence[int], among: int = -1) -> Match:
        """Find the holders of the longest prefixes of a prompt.

        Args:
            hashes: Sequence hashes of the prompt's blocks, first block first. Only those looked at are touched, so
                pass the packed view rather than a list.
            among: Slots to consider as a bit set; -1 for all.
        """
        found = Match()
        if not len(hashes):
            return found
        first = self._holders[0].get(hashes[0], 0) & among
        closed = first & ~self._open
        if closed:
            found.device = closed_depths(self._holders[0], hashes, closed)
        if first != closed:
            self._walk(hashes, first & self._open, found.device)
        if any(self._holders[1:]):
            self._extend(hashes, among, found)
        return found

    def check_integrity(self) -> list[str]:
        """Return every broken invariant in words; empty if there is none. O(blocks)."""
        found: list[str] = []
        total = 0
        expected: tuple[dict[int, int], ...] = tuple({} for _ in TIERS)
        for slot, shelves in enumerate(self._shelves):
            for rank, shelf in enumerate(shelves):
                total += len(shelf)
                found += [f"slot {slot} {TIERS[rank].value}: {problem}" for problem in shelf.problems()]
                for key in shelf.hashes():
                    expected[rank][key] = expected[rank].get(key, 0) | 1 << slot
            if shelves[0].closed is bool(self._open >> slot & 1):
                found.append(f"slot {slot}: closedness is out of date")
        if expected != self._holders:
            found.append("holders and shelves differ")
        if total != self._total:
            found.append(f"total is {self._total}, counted {total}")
        return found

    # -- lookup ------------------------------------------------------------------------------------------------------

    def _walk(self, hashes: Sequence[int], alive: int, out: list[tuple[int, int]]) -> None:
        get = self._holders[0].get
        for depth, key in enumerate(hashes):
            held = get(key, 0) & alive
            if held != alive:
                if depth:
                    out.append((depth, alive & ~held))
                alive = held
                if not alive:
                    return
        out.append((len(hashes), alive))

    def _extend(self, hashes: Sequence[int], among: int, found: Match) -> None:
        rest = (1 << len(self._workers)) - 1 & among
        starts = list(found.device)
        for _, bits in starts:
            rest &= ~bits
        if rest:
            starts.append((0, rest))
        for depth, bits in starts:
            self._extend_from(hashes, depth, bits, found.lower)

    def _extend_from(self, hashes: Sequence[int], depth: int, alive: int, out: list[tuple[int, int, int]]) -> None:
        lower = self._holders[1:]
        run, held_in = 0, (0,) * len(lower)
        while alive and depth < len(hashes):
            key = hashes[depth]
            nearest: list[int] = []
            for holders in lower:
                held = holders.get(key, 0) & alive if holders else 0
                nearest.append(held)
                alive &= ~held
            alive = nearest[0] | nearest[1] | nearest[2]
            if tuple(nearest) != held_in:
                _emit(run, held_in, out)
                run, held_in = 0, tuple(nearest)
            run += 1
            depth += 1
        _emit(run, held_in, out)

    # -- events ------------------------------------------------------------------------------------------------------

    def _store(self, slot: int, event: BlockStored) -> Applied:
        if event.tier not in TIERS:
            return Applied.IGNORED
        size = len(event)
        if not size or len(event.local_hashes) != len(event.engine_hashes):
            return Applied.INVALID
        room = min(size, self.max_blocks - self._total)
        if room < size:
            self.dropped_blocks += size - max(room, 0)
            self._lossy |= 1 << slot
            if room <= 0:
                return Applied.OVER_CAPACITY
        engine = list(unpack_hashes(event.engine_hashes)[:room])
        parent = event.parent_hash
        if parent is not None:
            held = self._resolve(slot, parent)
            if held is None and _chained(parent, event.local_hashes) != engine[0]:
                return Applied.UNKNOWN_PARENT
            parent = parent if held is None else held
        keys = self._keys(slot, parent, engine, event)
        self._place(slot, TIERS.index(event.tier), parent, keys, engine)
        return Applied.OK if room == size else Applied.OVER_CAPACITY

    def _resolve(self, slot: int, parent: int) -> int | None:
        for shelf in self._shelves[slot]:
            key = shelf.resolve(parent)
            if key is not None:
                return key
        return None

    def _keys(self, slot: int, parent: int | None, engine: list[int], event: BlockStored) -> list[int]:
        if not self._named >> slot & 1:
            if _continues(parent, engine, event):
                return engine
            self._use_names(slot)
        return chain_hashes(unpack_hashes(event.local_hashes)[: len(engine)], parent)

    def _use_names(self, slot: int) -> None:
        self._named |= 1 << slot
        for shelf in self._shelves[slot]:
            shelf.use_names()

    def _place(self, slot: int, rank: int, parent: int | None, keys: list[int], engine: list[int]) -> None:
        shelf = self._shelves[slot][rank]
        before = len(shelf)
        # A sequence that branches off names what is held already once more: only what follows is new.
        known = shelf.leading(keys, engine)
        if known:
            parent, keys, engine = keys[known - 1], keys[known:], engine[known:]
        if not keys:
            return
        holders = self._holders[rank]
        # Nobody holds them: then this worker does not either, and nothing need be looked up again.
        fresh = holders.keys().isdisjoint(keys)
        if not shelf.add_chain(parent, keys, engine, fresh=fresh):
            self._place_each(slot, rank, parent, keys, engine)
        elif fresh:
            holders.update(zip(keys, repeat(1 << slot)))
        else:
            self._mark(rank, 1 << slot, keys)
        self._total += len(shelf) - before
        if rank == 0 and (shelf.closed is bool(self._open >> slot & 1)):
            self._open ^= 1 << slot

    def _place_each(self, slot: int, rank: int, parent: int | None, keys: list[int], engine: list[int]) -> None:
        shelf = self._shelves[slot][rank]
        for key, name in zip(keys, engine, strict=True):
            fresh, lost = shelf.add(key, parent, name)
            if lost is not None:
                self._unmark(rank, 1 << slot, (lost,))
            if fresh:
                self._mark(rank, 1 << slot, (key,))
            parent = key

    def _remove(self, slot: int, event: BlockRemoved) -> Applied:
        if event.tier not in TIERS:
            return Applied.IGNORED
        rank = TIERS.index(event.tier)
        shelf = self._shelves[slot][rank]
        before = len(shelf)
        gone = [key for name in unpack_hashes(event.engine_hashes) if (key := shelf.remove(name)) is not None]
        self._unmark(rank, 1 << slot, gone)
        self._total += len(shelf) - before
        self._note_closed(slot, rank, shelf)
        return Applied.OK if gone or not len(event) else Applied.UNKNOWN_BLOCK

    def _mark(self, rank: int, bit: int, keys: Sequence[int]) -> None:
        holders = self._holders[rank]
        last = joined = 0
        for key, held in zip(keys, map(holders.get, keys), strict=True):
            if held is None:
                holders[key] = bit
            else:
                # Neighbours mostly have the same holders: one integer object then serves them all.
                if held != last:
                    last, joined = held, held | bit
                holders[key] = joined

    def _unmark(self, rank: int, bit: int, keys: Sequence[int]) -> None:
        holders = self._holders[rank]
        last = rest = 0
        for key in keys:
            held = holders[key]
            if held == bit:
                del holders[key]
            else:
                if held != last:
                    last, rest = held, held & ~bit
                holders[key] = rest

    def _clear_shelf(self, slot: int, rank: int) -> None:
        shelf = self._shelves[slot][rank]
        self._unmark(rank, 1 << slot, list(shelf.hashes()))
        self._total -= len(shelf)
        shelf.clear()
        self._note_closed(slot, rank, shelf)

    def _note_closed(self, slot: int, rank: int, shelf: Shelf) -> None:
        if rank == 0:
            self._open = self._open & ~(1 << slot) if shelf.closed else self._open | 1 << slot


def _emit(run: int, held_in: tuple[int, ...], out: list[tuple[int, int, int]]) -> None:
    if run:
        out.extend((rank, run, bits) for rank, bits in enumerate(held_in, start=1) if bits)


def _continues(parent: int | None, engine: list[int], event: BlockStored) -> bool:
    """Whether the engine's names at both ends of an event are the sequence hashes of its blocks."""
    contents, names, blocks = event.local_hashes, event.engine_hashes, len(engine)
    first = int.from_bytes(contents[:HASH_BYTES], "little") if parent is None else _chained(parent, contents)
    if first != engine[0]:
        return False
    if blocks == 1:
        return True
    end = blocks * HASH_BYTES
    last = names[end - 2 * HASH_BYTES : end - HASH_BYTES] + contents[end - HASH_BYTES : end]
    return xxhash.xxh3_64_intdigest(last, SEED) == engine[-1]


def _chained(parent: int, contents: bytes) -> int:
    """Return the sequence hash of the first of these blocks behind a parent."""
    return xxhash.xxh3_64_intdigest(parent.to_bytes(HASH_BYTES, "little") + contents[:HASH_BYTES], SEED)
