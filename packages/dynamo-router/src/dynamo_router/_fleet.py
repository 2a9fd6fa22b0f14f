"""The workers that a router may choose from, in slots shared with the index."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.cards import ModelCard
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ProjectedLoad, ReportedLoad, WorkerLoad
from dynamo_core.tokens import require_algorithm
from dynamo_router._bits import slots_of
from dynamo_router._index import BlockIndex
from dynamo_router._policy import Candidate


class Fleet:
    """Candidates by worker id, and the bit set of all their slots.

    Args:
        index: Gives out the slots.
        block_size: Tokens a block that every worker must have.
    """

    def __init__(self, index: BlockIndex, block_size: int) -> None:
        self.mask = 0
        self._index = index
        self._block_size = block_size
        self._by_id: dict[WorkerId, Candidate] = {}
        self._by_slot: dict[int, Candidate] = {}
        self._everyone: tuple[Candidate, ...] = ()

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._by_id

    @property
    def everyone(self) -> Sequence[Candidate]:
        """All candidates in the order of their ids."""
        return self._everyone

    def get(self, worker: WorkerId) -> Candidate | None:
        """Return a candidate, or None."""
        return self._by_id.get(worker)

    def within(self, bits: int) -> list[Candidate]:
        """Return the candidates of a bit set of slots, all of which must be in ``mask``."""
        table = self._by_slot
        return [table[slot] for slot in slots_of(bits)]

    def upsert(self, worker: WorkerId, card: ModelCard) -> bool:
        """Add a worker or refresh its facts; returns whether it is new.

        Raises:
            InvalidRequestError: if its block size or hash algorithm is not this router's.
        """
        if card.kv_block_size not in (0, self._block_size):
            raise InvalidRequestError(
                f"worker {worker} has KV blocks of {card.kv_block_size} tokens, this router's have {self._block_size}; "
                "start both with the same block size",
                reason="request.block_size_mismatch",
                param="kv_block_size",
            )
        require_algorithm(card.hash_algorithm)
        candidate = self._by_id.get(worker)
        new = candidate is None
        if candidate is None:
            candidate = Candidate(worker, self._index.slot(worker))
            self._by_id[worker] = candidate
            self._by_slot[candidate.slot] = candidate
            self._rebuild()
        config = card.runtime_config
        candidate.total_kv_blocks = config.total_kv_blocks or 0
        candidate.max_num_batched_tokens = config.max_num_batched_tokens or 0
        candidate.taints = frozenset(config.taints)
        return new

    def remove(self, worker: WorkerId) -> Candidate | None:
        """Take a worker out; returns it, or None if it was not there."""
        candidate = self._by_id.pop(worker, None)
        if candidate is not None:
            del self._by_slot[candidate.slot]
            self._rebuild()
        return candidate

    def report(self, worker: WorkerId, reported: ReportedLoad) -> None:
        """Take a worker's own report; one of an unknown worker is ignored."""
        candidate = self._by_id.get(worker)
        if candidate is not None:
            candidate.reported = reported

    def loads(self) -> list[WorkerLoad]:
        """Return every worker's load."""
        return [
            WorkerLoad(
                worker.worker,
                worker.reported,
                ProjectedLoad(worker.prefill_tokens, worker.decode_blocks, worker.active_requests),
            )
            for worker in self._everyone
        ]

    def _rebuild(self) -> None:
        self._everyone = tuple(self._by_id[worker] for worker in sorted(self._by_id))
        self.mask = sum(1 << worker.slot for worker in self._everyone)
