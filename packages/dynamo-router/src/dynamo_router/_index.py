"""The event-fed KV index: which worker holds which block of a sequence, in which tier.

Blocks are keyed by their chained sequence hash, which names a position and everything before it. ``_runs`` keeps them
by stretches with the same holders, so a look-up costs as many steps as there are stretches along a prompt, whatever
the number of workers, and finds the place where a prompt leaves a stretch by bisection.

Values here do no I/O and know no order of events; ``_indexer`` does.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import xxhash

from dynamo_core.enums import Tier
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import HASH_BYTES, SEED, chain_hashes, pack_hashes, unpack_hashes
from dynamo_router._match import TIERS, Match
from dynamo_router._names import EngineNames
from dynamo_router._runs import Packed, RunTable

DEFAULT_MAX_BLOCKS = 8_000_000


class Applied(enum.Enum):
    """What became of an event."""

    OK = "ok"
    IGNORED = "ignored"
    UNKNOWN_BLOCK = "unknown_block"
    UNKNOWN_PARENT = "unknown_parent"
    INVALID = "invalid"
    OVER_CAPACITY = "over_capacity"


class _Prompt(NamedTuple):
    hashes: Sequence[int]
    packed: Packed


class _Slot:
    """One worker's share of the index.

    Attributes:
        worker: Whose; None while the slot is free.
        number: Its place in bit sets.
        bit: That place as a bit set.
        blocks: Blocks held, by tier.
        names: What its engine calls them, by tier; None while it calls them by their sequence hashes.
        lossy: Whether blocks were dropped for lack of room.
    """

    __slots__ = ("bit", "blocks", "lossy", "names", "number", "worker")

    def __init__(self, worker: WorkerId, number: int) -> None:
        self.worker: WorkerId | None = worker
        self.number = number
        self.bit = 1 << number
        self.blocks = [0] * len(TIERS)
        self.names: tuple[EngineNames, ...] | None = None
        self.lossy = False


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
        self._tiers: tuple[RunTable, ...] = tuple(RunTable() for _ in TIERS)
        self._slots: list[_Slot] = []
        self._by_worker: dict[WorkerId, _Slot] = {}

    def __len__(self) -> int:
        return self._total

    @property
    def distinct_blocks(self) -> int:
        """Distinct blocks on any device."""
        return len(self._tiers[0])

    def slot(self, worker: WorkerId) -> int:
        """Return the worker's slot, giving it one if it is new."""
        return self._of(worker).number

    def workers(self) -> list[WorkerId]:
        """Return the workers that have a slot."""
        return list(self._by_worker)

    def worker_at(self, slot: int) -> WorkerId | None:
        """Return whose slot it is."""
        return self._slots[slot].worker

    def blocks_of(self, worker: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        """Return how many blocks a worker holds in a tier."""
        slot = self._by_worker.get(worker)
        return 0 if slot is None else slot.blocks[TIERS.index(tier)]

    def blocks(self, worker: WorkerId, tier: Tier) -> Iterator[tuple[int, int | None]]:
        """Iterate over ``(sequence hash, parent)`` of what a worker holds. The index must not change meanwhile."""
        for run in self._tiers[TIERS.index(tier)].held_by(self._of(worker).bit):
            parent = run.parent
            for key in unpack_hashes(bytes(run.keys)):
                yield key, parent
                parent = key

    def names(self, worker: WorkerId, tier: Tier) -> Mapping[int, int]:
        """Return engine hash -> sequence hash of what a worker holds; empty if its engine uses sequence hashes."""
        names = self._of(worker).names
        return {} if names is None else names[TIERS.index(tier)].items()

    def hold(
        self, worker: WorkerId, tier: Tier, entries: Iterable[tuple[int, int | None, int]], *, named: bool
    ) -> None:
        """Hold blocks given as ``(sequence hash, parent, engine hash)``, up to the memory bound.

        Entries that continue the one before them are entered together.
        """
        slot = self._of(worker)
        if named:
            self._use_names(slot)
        rank = TIERS.index(tier)
        first: int | None = None
        keys: list[int] = []
        names: list[int] = []
        for key, parent, name in entries:
            if keys and parent != keys[-1]:
                self._hold_chain(slot, rank, first, keys, names)
                keys, names = [], []
            if not keys:
                first = parent
            keys.append(key)
            names.append(name)
        self._hold_chain(slot, rank, first, keys, names)

    def is_lossy(self, worker: WorkerId) -> bool:
        """Whether blocks of this worker were dropped for lack of room since it was last cleared."""
        slot = self._by_worker.get(worker)
        return slot is not None and slot.lossy

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker and free its slot."""
        if worker in self._by_worker:
            self.clear(worker)
            self._by_worker.pop(worker).worker = None

    def clear(self, worker: WorkerId, tier: Tier | None = None) -> None:
        """Forget what a worker holds, in one tier or in all."""
        slot = self._of(worker)
        for rank, kind in enumerate(TIERS):
            if tier is None or kind is tier:
                if slot.blocks[rank]:
                    self._tiers[rank].clear(slot.bit)
                self._total -= slot.blocks[rank]
                slot.blocks[rank] = 0
                if slot.names is not None:
                    slot.names[rank].clear()
        if tier is None:
            slot.lossy = False

    def apply(self, worker: WorkerId, event: KvEvent) -> Applied:
        """Apply one event.

        An event whose parent the worker does not hold is still placed if its engine hashes are sequence hashes;
        otherwise its position is unknown and it is refused.
        """
        if type(event) is BlockStored:
            return self._store(self._of(worker), event)
        if type(event) is BlockRemoved:
            return self._remove(self._of(worker), event)
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
        packed = hashes.tobytes() if isinstance(hashes, memoryview) else pack_hashes(hashes)
        found.device = self._tiers[0].depths(hashes, packed, among)
        if len(self._tiers[1]) or len(self._tiers[2]) or len(self._tiers[3]):
            self._extend(_Prompt(hashes, packed), among, found)
        return found

    def check_integrity(self) -> list[str]:
        """Return every broken invariant in words; empty if there is none. O(blocks x workers)."""
        found = [f"{TIERS[rank].value}: {text}" for rank, table in enumerate(self._tiers) for text in table.problems()]
        for number, slot in enumerate(self._slots):
            for rank, table in enumerate(self._tiers):
                held = [key for run in table.held_by(slot.bit) for key in unpack_hashes(bytes(run.keys))]
                what = f"slot {number} {TIERS[rank].value}"
                if len(held) != slot.blocks[rank]:
                    found.append(f"{what}: {slot.blocks[rank]} blocks are counted, {len(held)} held")
                if slot.names is not None and set(slot.names[rank].items().values()) != set(held):
                    found.append(f"{what}: engine names and held blocks differ")
        total = sum(sum(slot.blocks) for slot in self._slots)
        if total != self._total:
            found.append(f"total is {self._total}, counted {total}")
        return found

    def _of(self, worker: WorkerId) -> _Slot:
        slot = self._by_worker.get(worker)
        if slot is None:
            number = next((free.number for free in self._slots if free.worker is None), len(self._slots))
            slot = self._by_worker[worker] = _Slot(worker, number)
            self._slots[number : number + 1] = [slot]
        return slot

    # -- lookup ------------------------------------------------------------------------------------------------------

    def _extend(self, prompt: _Prompt, among: int, found: Match) -> None:
        rest = (1 << len(self._slots)) - 1 & among
        starts = list(found.device)
        for _, bits in starts:
            rest &= ~bits
        if rest:
            starts.append((0, rest))
        for depth, bits in starts:
            self._extend_from(prompt, depth, bits, found.lower)

    def _extend_from(self, prompt: _Prompt, depth: int, alive: int, out: list[tuple[int, int, int]]) -> None:
        lower = self._tiers[1:]
        run, held_in = 0, (0,) * len(lower)
        while alive and depth < len(prompt.hashes):
            nearest, step = self._nearest(prompt, depth, alive)
            alive = nearest[0] | nearest[1] | nearest[2]
            if nearest != held_in:
                _emit(run, held_in, out)
                run, held_in = 0, nearest
            run += step
            depth += step
        _emit(run, held_in, out)

    def _nearest(self, prompt: _Prompt, depth: int, alive: int) -> tuple[tuple[int, ...], int]:
        """Return which slots hold a block in each lower tier and no nearer one, and for how many blocks that stays."""
        nearest: list[int] = []
        step = len(prompt.hashes) - depth
        for table in self._tiers[1:]:
            holders, length = table.stretch(prompt.hashes, prompt.packed, depth) if alive and len(table) else (0, step)
            nearest.append(holders & alive)
            alive &= ~holders
            step = min(step, length)
        return tuple(nearest), step

    # -- events ------------------------------------------------------------------------------------------------------

    def _store(self, slot: _Slot, event: BlockStored) -> Applied:
        if event.tier not in TIERS:
            return Applied.IGNORED
        size = len(event)
        if not size or len(event.local_hashes) != len(event.engine_hashes):
            return Applied.INVALID
        room = self._room(slot, size)
        if not room:
            return Applied.OVER_CAPACITY
        engine = list(unpack_hashes(event.engine_hashes)[:room])
        parent = event.parent_hash
        if parent is not None:
            held = self._resolve(slot, parent)
            if held is None and _chained(parent, event.local_hashes) != engine[0]:
                return Applied.UNKNOWN_PARENT
            parent = parent if held is None else held
        rank = TIERS.index(event.tier)
        if slot.names is None and _continues(parent, engine, event):
            packed = event.engine_hashes[: room * HASH_BYTES]
            self._count(slot, rank, self._tiers[rank].add(slot.bit, parent, engine, packed))
        else:
            self._use_names(slot)
            keys = chain_hashes(unpack_hashes(event.local_hashes)[:room], parent)
            self._place_named(slot, rank, parent, keys, engine)
        return Applied.OK if room == size else Applied.OVER_CAPACITY

    def _room(self, slot: _Slot, size: int) -> int:
        """Return how many of some new blocks may be held; the others count as dropped."""
        room = max(min(size, self.max_blocks - self._total), 0)
        if room < size:
            self.dropped_blocks += size - room
            slot.lossy = True
        return room

    def _hold_chain(self, slot: _Slot, rank: int, parent: int | None, keys: list[int], names: list[int]) -> None:
        room = self._room(slot, len(keys))
        if not room:
            return
        if slot.names is not None:
            self._place_named(slot, rank, parent, keys[:room], names[:room])
        else:
            self._count(slot, rank, self._tiers[rank].add(slot.bit, parent, keys[:room], pack_hashes(keys[:room])))

    def _resolve(self, slot: _Slot, parent: int) -> int | None:
        """Return the sequence hash of a block that a worker holds in any tier, by its engine hash."""
        if slot.names is not None:
            found = (names.get(parent) for names in slot.names)
            return next((key for key in found if key is not None), None)
        return parent if any(table.holds(slot.bit, parent) for table in self._tiers) else None

    def _use_names(self, slot: _Slot) -> None:
        if slot.names is None:
            held = (table.held_by(slot.bit) for table in self._tiers)
            slot.names = tuple(
                EngineNames(key for run in runs for key in unpack_hashes(bytes(run.keys))) for runs in held
            )

    def _place_named(self, slot: _Slot, rank: int, parent: int | None, keys: list[int], engine: list[int]) -> None:
        assert slot.names is not None
        table, names, bit = self._tiers[rank], slot.names[rank], slot.bit
        if not table.holds_any(bit, keys) and names.add_new(engine, keys):
            self._count(slot, rank, table.add(bit, parent, keys, pack_hashes(keys)))
            return
        for key, name in zip(keys, engine, strict=True):
            lost = names.add(name, key, held=table.holds(bit, key))
            if lost is not None:
                self._count(slot, rank, -table.remove(bit, [lost], pack_hashes([lost])))
            self._count(slot, rank, table.add(bit, parent, [key], pack_hashes([key])))
            parent = key

    def _remove(self, slot: _Slot, event: BlockRemoved) -> Applied:
        if event.tier not in TIERS:
            return Applied.IGNORED
        rank = TIERS.index(event.tier)
        packed = event.engine_hashes
        if slot.names is not None:
            names = slot.names[rank]
            packed = pack_hashes(key for name in unpack_hashes(packed) if (key := names.remove(name)) is not None)
        gone = self._tiers[rank].remove(slot.bit, unpack_hashes(packed), packed)
        self._count(slot, rank, -gone)
        return Applied.OK if gone or not len(event) else Applied.UNKNOWN_BLOCK

    def _count(self, slot: _Slot, rank: int, blocks: int) -> None:
        slot.blocks[rank] += blocks
        self._total += blocks


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
