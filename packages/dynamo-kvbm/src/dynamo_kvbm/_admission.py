"""Whether a block is worth moving: which blocks are offloaded, and which tiers are faster than computing again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dynamo_core.clock import Clock
from dynamo_core.kv import BlockDescriptor

MAX_EXPECTED = 1024
SAMPLE_WEIGHT = 0.2
MAX_SAMPLE = 4.0
PROBE_EVERY = 32


class SecondTouch:
    """Remembers, within a bound, which blocks were seen before.

    Args:
        capacity_blocks: Most blocks remembered; the one seen longest ago is forgotten.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._seen: OrderedDict[int, int] = OrderedDict()

    def note(self, sequence_hashes: Iterable[int]) -> None:
        """Count one more sight of each block."""
        for item in sequence_hashes:
            self._seen[item] = self._seen.pop(item, 0) + 1
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)

    def seen_twice(self, sequence_hash: int) -> bool:
        """Whether a block was seen twice or more."""
        return self._seen.get(sequence_hash, 0) > 1


class CostTest:
    """Compares, from measurements, fetching a block with computing it again.

    The time to compute a block is taken from what the engine does: from the moment a prefix was looked up to the moment
    its last missing block became full, divided by the missing blocks. So it holds the queueing and batching of the real
    engine. A tier without measurements passes. One that fails is measured again: at the 2nd, 4th, 8th, 16th and then
    every 32nd question, since one bad moment of the machine must not close it for long. For the same reason a sample
    counts as at most four times the mean.

    Args:
        clock: Source of time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._expected: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self._fetch_s: dict[str, float] = {}
        self._refusals: dict[str, int] = {}
        self.recompute_s: float | None = None

    def looked_up(self, missing: Sequence[int]) -> None:
        """Note that the engine is about to compute these blocks."""
        if missing:
            self._expected[missing[-1]] = (self._clock.monotonic(), len(missing))
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def computed(self, blocks: Sequence[BlockDescriptor]) -> None:
        """Note that blocks became full."""
        for block in blocks:
            started = self._expected.pop(block.sequence_hash, None)
            if started is not None:
                self.recompute_s = _smoothed(self.recompute_s, (self._clock.monotonic() - started[0]) / started[1])

    def fetched(self, source: str, blocks: int, elapsed_s: float) -> None:
        """Note how long it took to fetch blocks from a tier or a peer."""
        if blocks:
            self._fetch_s[source] = _smoothed(self._fetch_s.get(source), elapsed_s / blocks)

    def fetch_s(self, source: str) -> float | None:
        """Seconds to fetch one block, smoothed; None before the first measurement."""
        return self._fetch_s.get(source)

    def worth(self, source: str) -> bool:
        """Whether a block should be fetched from a tier."""
        fetch_s = self._fetch_s.get(source)
        if fetch_s is None or self.recompute_s is None or fetch_s <= self.recompute_s:
            self._refusals[source] = 0
            return True
        asked = self._refusals[source] = self._refusals.get(source, 0) + 1
        return asked % PROBE_EVERY == 0 or (1 < asked < PROBE_EVERY and asked.bit_count() == 1)


def _smoothed(mean: float | None, sample: float) -> float:
    return sample if mean is None else mean + SAMPLE_WEIGHT * (min(sample, MAX_SAMPLE * mean) - mean)
