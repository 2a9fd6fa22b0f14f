"""A cascade of tiers as one store: blocks enter at the nearest, sink as they age, and come back from wherever they are.

The calling thread copies to and from the nearest tier. Everything else is written behind, by one thread a tier. So the
cascade never holds an engine step up for longer than the copy it asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import structlog

from dynamo_core.clock import Clock
from dynamo_core.enums import Tier
from dynamo_core.errors import CancelledRequestError, ConfigurationError
from dynamo_core.kv import BlockDescriptor, BlockStore, MatchResult, TierChange
from dynamo_core.telemetry import Metrics
from dynamo_kvbm._admission import CostTest
from dynamo_kvbm._announcer import TierAnnouncer
from dynamo_kvbm._level import Level
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._peers.source import PeerSource
from dynamo_kvbm._settings import OffloadPolicy
from dynamo_kvbm._tiers.base import (
    SupportsArena,
    SupportsForeignChanges,
    SupportsLend,
    SupportsSpill,
    SupportsTouch,
    described,
)
from dynamo_kvbm._transfer.engine import Transfer, TransferEngine

PREFETCH_BATCH = 16

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TierConfig:
    """A tier below the nearest one.

    Attributes:
        store: The tier.
        policy: What comes down to it: everything at once (register), what was used twice, or what the tier above
            evicts.
        queue_blocks: Most blocks staged before it.
    """

    store: BlockStore
    policy: OffloadPolicy = OffloadPolicy.EVICT
    queue_blocks: int = 64


class BlockSource(Protocol):
    """Where blocks that are not in the nearest tier are read from: a level below it, or peers."""

    @property
    def name(self) -> str:
        """Label in metrics and measurements."""
        ...

    @property
    def tier(self) -> Tier:
        """What a match calls it."""
        ...

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is there. Does no I/O."""
        ...

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the bytes of each block, None for those that do not come."""
        ...

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return what is known of those of these blocks that are there."""
        ...

    def note_use(self, sequence_hashes: Sequence[int]) -> None:
        """Count a use of blocks."""
        ...


class BlockManager:
    """Tiers, nearest first.

    All methods belong to one thread, for example an engine's step thread; ``on_change`` is called from any thread.

    Args:
        nearest: Where blocks enter.
        lower: The tiers below, nearest first, each of another ``Tier``.
        block_bytes: Size of every block.
        on_change: Hears what enters and leaves each tier, and at once what the tiers hold already.
        metrics: Where counts go.
        clock: Measures transfers.
        cost_test: Refuse blocks whose transfer was measured to take longer than computing them; None for never.
        peers: Where else blocks may be; asked after local tiers and before an external one.

    Raises:
        ConfigurationError: if two tiers are of the same ``Tier``, or a tier that must spill cannot.
    """

    def __init__(  # noqa: PLR0913 - built in one place, every argument by name
        self,
        nearest: BlockStore,
        lower: Sequence[TierConfig] = (),
        *,
        block_bytes: int,
        on_change: Callable[[TierChange], None],
        metrics: Metrics,
        clock: Clock,
        cost_test: CostTest | None = None,
        peers: PeerSource | None = None,
    ) -> None:
        self._nearest = nearest
        self._metrics = KvbmMetrics(metrics)
        self._clock = clock
        self._cost_test = cost_test
        self._announcer = TierAnnouncer(on_change, self._metrics)
        _require_distinct([nearest.tier, *(config.store.tier for config in lower)])
        self._levels = [
            Level(config.store, config.policy, block_bytes, config.queue_blocks, self._announcer, self._metrics)
            for config in lower
        ]
        local = [level for level in self._levels if level.tier is not Tier.EXTERNAL]
        others: list[BlockSource] = [peers] if peers is not None else []
        self._sources: list[BlockSource] = [*local, *others, *self._levels[len(local) :]]
        self._tiers = {nearest.tier.value: nearest.tier} | {source.name: source.tier for source in self._sources}
        self._transfers: TransferEngine | None = None
        self._peers = peers
        self._closed = False
        self._connect()
        for store in self.stores:
            self._metrics.capacity.labels(store.tier.value).set(store.capacity_blocks)
            if isinstance(store, SupportsArena):
                self._metrics.arena.labels(store.tier.value, store.pages.value).set(store.arena_bytes)
                _log.info("arena", tier=store.tier.value, bytes=store.arena_bytes, pages=store.pages.value)
            self._announcer.compare(store)

    @property
    def nearest(self) -> BlockStore:
        """The tier where blocks enter."""
        return self._nearest

    @property
    def stores(self) -> list[BlockStore]:
        """The tiers, nearest first."""
        return [self._nearest, *(level.store for level in self._levels)]

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is in any tier."""
        return [place is not None for place in self._locate(sequence_hashes)]

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        """Return the longest prefix that the tiers hold together, and renew it in each of them."""
        self.announce_foreign()
        places = self._worthwhile(list(itertools.takewhile(bool, self._locate(sequence_hashes))))
        matched = sequence_hashes[: len(places)]
        if isinstance(self._nearest, SupportsTouch):
            self._nearest.touch(matched)
        for source in self._sources:
            source.note_use(matched)
        self._metrics.requested.inc(len(sequence_hashes))
        for place in set(places):
            self._metrics.matched.labels(place).inc(places.count(place))
        if self._cost_test is not None:
            self._cost_test.looked_up(sequence_hashes[len(places) :])
        return MatchResult(len(places), tuple(self._tiers[place] for place in places))

    def offload(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> None:
        """Put blocks into the nearest tier; what leaves it for them sinks."""
        evicted = self._nearest.put(blocks, data)
        stored = self._announcer.refresh(self._nearest, blocks, evicted)
        self._metrics.offloaded.labels(self._nearest.tier.value).inc(len(stored))
        for level in self._levels:
            level.note_use([block.sequence_hash for block in stored])
            if level.policy is OffloadPolicy.REGISTER:
                level.take(blocks, data)

    @contextmanager
    def lend(self, sequence_hashes: Sequence[int]) -> Generator[list[bytes | memoryview]]:
        """Lend the bytes of the longest prefix that arrives whole, then promote what came from lower tiers.

        Views are valid, and not evicted, while the context lasts.
        """
        store = self._nearest
        lent = store.lend(sequence_hashes) if isinstance(store, SupportsLend) else _lend_copies(store, sequence_hashes)
        with lent as held:
            yield from self._lend(sequence_hashes, held)

    def prefetch(self, sequence_hashes: Sequence[int], *, priority: int = 0) -> Transfer[int]:
        """Start to copy the part of the longest prefix that lies in lower tiers to the nearest one, ahead of its use.

        Returns:
            The transfer; its result is the number of blocks copied.

        Raises:
            CapacityExhaustedError: if too many blocks wait to be fetched already.
        """
        if self._transfers is None:
            self._transfers = TransferEngine(workers=1)
        located = itertools.takewhile(bool, self._locate(sequence_hashes))
        near = self._nearest.tier.value
        below = [item for item, place in zip(sequence_hashes, located, strict=False) if place != near]
        return self._transfers.submit(
            lambda cancelled: self._copy_up(below, cancelled), blocks=len(below), priority=priority
        )

    def announce_foreign(self) -> None:
        """Report what others changed in tiers that they share; each match does it first."""
        for store in self.stores:
            if isinstance(store, SupportsForeignChanges):
                changed = store.drain_changes()
                if changed is None:
                    self._announcer.compare(store)
                elif changed:
                    self._announcer.refresh(store, described(store, changed), changed)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that sinks has been written; return whether that came in time for each tier."""
        return all(level.queue.flush(timeout_s) for level in self._levels)

    def clear(self) -> None:
        """Drop every block of every tier that nobody reads."""
        announced = self._announcer.announced(self._nearest.tier)
        self._nearest.remove(announced)
        self._announcer.refresh(self._nearest, (), announced)
        for level in self._levels:
            level.clear()

    def close(self) -> None:
        """Write what is staged and close all tiers. Idempotent."""
        if not self._closed:
            self._closed = True
            if self._transfers is not None:
                self._transfers.close()
            if self._peers is not None:
                self._peers.close()
            for level in self._levels:
                level.close()
            self._nearest.close()

    def _connect(self) -> None:
        above = self._nearest
        for level in self._levels:
            if not isinstance(above, SupportsSpill):
                raise ConfigurationError(
                    f"tier {above.tier.value} hands no victims on, so {level.tier.value} below it would stay empty; "
                    "put it last"
                )
            above.spill_to(level.take)
            above = level.store

    def _locate(self, sequence_hashes: Sequence[int]) -> list[str | None]:
        """Return the name of the nearest place of each block."""
        near = self._nearest.tier.value
        places: list[str | None] = [near if there else None for there in self._nearest.contains(sequence_hashes)]
        for source in self._sources:
            if None not in places:
                break
            below = source.contains(sequence_hashes)
            places = [place or (source.name if there else None) for place, there in zip(places, below, strict=True)]
        return places

    def _worthwhile(self, places: Sequence[str | None]) -> list[str]:
        found = [place for place in places if place is not None]
        if self._cost_test is None:
            return found
        for place in dict.fromkeys(found):
            if not self._cost_test.worth(place):
                self._metrics.refused.labels(place).inc(found.count(place))
                found = found[: found.index(place)]
        return found

    def _lend(
        self, sequence_hashes: Sequence[int], held: Mapping[int, memoryview]
    ) -> Generator[list[bytes | memoryview]]:
        fetched = self._fetch(sequence_hashes, held)
        both: dict[int, bytes | memoryview] = {**held, **fetched}
        views = [both[item] for item in itertools.takewhile(both.__contains__, sequence_hashes)]
        near = sum(1 for item in sequence_hashes[: len(views)] if item in held)
        started = self._clock.monotonic()
        yield views
        if self._cost_test is not None and not fetched:
            self._cost_test.fetched(self._nearest.tier.value, near, self._clock.monotonic() - started)
        self._metrics.onboarded.labels(self._nearest.tier.value).inc(near)
        self._promote(fetched)

    def _fetch(self, sequence_hashes: Sequence[int], held: Mapping[int, memoryview]) -> dict[int, bytes | memoryview]:
        """Read the part of the longest prefix that is not in the nearest tier."""
        places = list(itertools.takewhile(bool, self._locate(sequence_hashes)))
        fetched: dict[int, bytes | memoryview] = {}
        for source in self._sources:
            wanted = [
                item
                for item, place in zip(sequence_hashes, places, strict=False)
                if place == source.name and item not in held
            ]
            if wanted:
                fetched |= self._read(source, wanted)
        return fetched

    def _copy_up(self, hashes: Sequence[int], cancelled: Callable[[], bool]) -> int:
        copied = 0
        for start in range(0, len(hashes), PREFETCH_BATCH):
            if cancelled():
                raise CancelledRequestError(f"prefetch ended after {copied} of {len(hashes)} blocks")
            fetched = self._fetch(hashes[start : start + PREFETCH_BATCH], {})
            self._promote(fetched)
            copied += len(fetched)
        return copied

    def _read(self, source: BlockSource, wanted: Sequence[int]) -> dict[int, bytes | memoryview]:
        started = self._clock.monotonic()
        data = source.get(wanted)
        elapsed_s = self._clock.monotonic() - started
        found = {item: piece for item, piece in zip(wanted, data, strict=True) if piece is not None}
        self._metrics.onboarded.labels(source.name).inc(len(found))
        self._metrics.fetch_s.labels(source.name).inc(elapsed_s)
        if self._cost_test is not None:
            # A fetch that brought nothing cost its time all the same.
            self._cost_test.fetched(source.name, max(1, len(found)), elapsed_s)
        return found

    def _promote(self, fetched: Mapping[int, bytes | memoryview]) -> None:
        """Copy fetched blocks into the nearest tier, as far as a tier can say what they are."""
        known = [block for source in self._sources for block in source.describe(list(fetched))]
        blocks = list({block.sequence_hash: block for block in known}.values())
        if blocks:
            evicted = self._nearest.put(blocks, [fetched[block.sequence_hash] for block in blocks])
            self._announcer.refresh(self._nearest, blocks, evicted)


@contextmanager
def _lend_copies(store: BlockStore, sequence_hashes: Sequence[int]) -> Generator[dict[int, memoryview]]:
    found = zip(sequence_hashes, store.get(sequence_hashes), strict=True)
    yield {item: memoryview(piece) for item, piece in found if piece is not None}


def _require_distinct(tiers: Sequence[Tier]) -> None:
    twice = {tier.value for tier in tiers if tiers.count(tier) > 1}
    if twice:
        raise ConfigurationError(f"two tiers are {', '.join(sorted(twice))}; give each tier of the cascade once")
