"""What the router believes each worker has cached: the exact index, the approximate one, or nothing, per worker."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.ids import WorkerId
from dynamo_router._active import ActiveBlocks
from dynamo_router._approximate import ApproximateIndex
from dynamo_router._fleet import Fleet
from dynamo_router._indexer import Indexer
from dynamo_router._load import NO_PREDICTION, Prediction
from dynamo_router._policy import NO_BLOCKS, Candidate
from dynamo_router._prompt import Prompt
from dynamo_router._truth import IndexMode, Truth


class CacheView:
    """Writes what candidates hold of a prompt onto them, from the best source for each.

    Args:
        fleet: The candidates.
        indexer: The exact index and the state of its streams.
        active: Blocks of booked requests.
        block_size: Tokens a block.
        ttl_s: Seconds for which a routed block counts as held in the approximate index.
        assume_reuse: Whether blocks of prompts that were sent to a worker may count as cached without its saying so.
    """

    def __init__(
        self,
        fleet: Fleet,
        indexer: Indexer,
        active: ActiveBlocks,
        *,
        block_size: int,
        ttl_s: float,
        assume_reuse: bool,
    ) -> None:
        self.truth = Truth()
        self.approximate = ApproximateIndex(ttl_s)
        self._fleet = fleet
        self._indexer = indexer
        self._active = active
        self._block_size = block_size
        self._assume_reuse = assume_reuse

    def mode(self, worker: Candidate) -> IndexMode:
        """Return what a worker's prediction is made from."""
        return self.truth.mode(worker.slot, live=bool(self._indexer.live >> worker.slot & 1))

    def show(self, prompt: Prompt, now_s: float) -> list[Candidate]:
        """Write onto the candidates what they hold; returns those written to, for ``hide``."""
        touched: list[Candidate] = []
        if not len(prompt.hashes):
            return touched
        mask = self._fleet.mask
        exact = mask & self._indexer.live & ~self.truth.exact_distrusted
        if exact:
            for blocks, bits in self._indexer.index.match(prompt.hashes, exact).groups():
                self._write(prompt, blocks, bits, touched)
        approximate = mask & ~exact & ~self.truth.approximate_distrusted
        if approximate and self._assume_reuse:
            for depth, bits in self.approximate.match(prompt.hashes, approximate, now_s):
                self._write(prompt, (depth, 0, 0, 0), bits, touched)
        for depth, bits in self._active.depths(prompt.hashes, mask):
            users = self._fleet.within(bits)
            # What an earlier request there is about to compute, this one will find.
            expected = self._tokens(prompt, depth) if self._assume_reuse else 0
            for worker in users:
                worker.active_blocks = depth
                worker.cached_tokens = max(worker.cached_tokens, expected)
            touched += users
        return touched

    def hide(self, touched: list[Candidate]) -> None:
        """Take back what ``show`` wrote."""
        for worker in touched:
            worker.tier_blocks, worker.cached_tokens, worker.active_blocks = NO_BLOCKS, 0, 0

    def book(self, worker: Candidate, prompt: Prompt, now_s: float) -> Prediction:
        """Note that a prompt goes to a worker; returns what each index that serves it predicted.

        The exact index of a worker with a whole stream is always asked, so that it can win belief back; the
        approximate index is kept only for workers that the exact one is not used for.
        """
        bit = 1 << worker.slot
        floor = self._tokens(prompt, worker.active_blocks) if self._assume_reuse else 0
        live = bool(self._indexer.live & bit)
        if self.mode(worker) is IndexMode.EXACT:
            return Prediction(exact=worker.cached_tokens)
        if not self._assume_reuse:
            return NO_PREDICTION
        depths = self.approximate.match(prompt.hashes, bit, now_s)
        approximate = max(self._tokens(prompt, depths[0][0]) if depths else 0, floor)
        self.approximate.insert(worker.slot, prompt.hashes, now_s, capacity_blocks=worker.total_kv_blocks)
        if not live:
            return Prediction(approximate=approximate)
        groups = self._indexer.index.match(prompt.hashes, bit).groups()
        exact = self._tokens(prompt, sum(groups[0][0])) if groups else 0
        return Prediction(exact=max(exact, floor), approximate=approximate)

    def note(self, worker: Candidate, hashes: Sequence[int], now_s: float) -> None:
        """Note what another router sends to a worker, if this one predicts what the worker holds."""
        if len(hashes) and self._assume_reuse and self.mode(worker) is not IndexMode.EXACT:
            self.approximate.insert(worker.slot, hashes, now_s, capacity_blocks=worker.total_kv_blocks)

    def settle(self) -> None:
        """Enter now what bookings have put off until the next decision."""
        self._active.settle()
        self.approximate.settle()

    def judge(self, worker: Candidate, prediction: Prediction, reported: int) -> bool:
        """Score a prediction; returns whether the worker's exact index just lost belief."""
        if self.mode(worker) is IndexMode.EXACT:
            self.approximate.clear(worker.slot)
        return self.truth.observe(
            worker.slot, exact=prediction.exact, approximate=prediction.approximate, reported=reported
        )

    def forget(self, worker: Candidate) -> None:
        """Drop everything believed about a worker."""
        self.truth.forget(worker.slot)
        self.approximate.clear(worker.slot)

    def modes(self) -> dict[WorkerId, IndexMode]:
        """Return the mode of each worker."""
        return {worker.worker: self.mode(worker) for worker in self._fleet.everyone}

    def _write(self, prompt: Prompt, blocks: tuple[int, ...], bits: int, touched: list[Candidate]) -> None:
        cached = self._tokens(prompt, sum(blocks))
        holders = self._fleet.within(bits)
        for worker in holders:
            worker.tier_blocks = blocks
            worker.cached_tokens = cached
        touched += holders

    def _tokens(self, prompt: Prompt, blocks: int) -> int:
        return min(blocks * self._block_size, prompt.tokens)
