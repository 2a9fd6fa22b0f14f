"""KV cache events, and the envelope in which any event travels.

Four identifiers must not be confused:

* local hash: content of one block alone, position-free;
* sequence hash: our chained hash, which names a block together with everything before it;
* engine hash: whatever the engine calls the block; opaque, used only to find it again on removal;
* event id: position in the event stream of one (worker, dp rank), growing by one.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from dynamo_core.enums import Tier
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import HASH_BYTES, XXH3_1337_V1, PackedHashes


class BlockStored(msgspec.Struct, frozen=True, tag="stored", omit_defaults=True):
    """Consecutive full blocks of one sequence became reusable in a tier.

    Attributes:
        event_id: Position in this worker's stream.
        engine_hashes: The engine's own names of the blocks, packed; equal to sequence hashes for engines of ours.
        local_hashes: Content hashes, packed, one a block.
        parent_hash: Engine hash of the block before the first one; None at the start of a sequence.
        start_block: Position of the first block in its sequence, if the engine knows it.
        tier: Where the blocks lie.
        lora: LoRA adapter under which they were computed.
    """

    event_id: int
    engine_hashes: PackedHashes
    local_hashes: PackedHashes
    parent_hash: int | None = None
    start_block: int | None = None
    tier: Tier = Tier.DEVICE
    lora: str = ""

    def __len__(self) -> int:
        return len(self.engine_hashes) // HASH_BYTES


class BlockRemoved(msgspec.Struct, frozen=True, tag="removed", omit_defaults=True):
    """Blocks left a tier."""

    event_id: int
    engine_hashes: PackedHashes
    tier: Tier = Tier.DEVICE

    def __len__(self) -> int:
        return len(self.engine_hashes) // HASH_BYTES


class BlocksCleared(msgspec.Struct, frozen=True, tag="cleared", omit_defaults=True):
    """Everything of this (worker, dp rank) is gone, in one tier or, with None, in all."""

    event_id: int
    tier: Tier | None = None


class UnknownKvEvent(msgspec.Struct, frozen=True, tag="unknown", omit_defaults=True):
    """An event of a kind that this release does not know; it only moves the sequence on."""

    event_id: int
    kind: str = ""


KvEvent: TypeAlias = BlockStored | BlockRemoved | BlocksCleared | UnknownKvEvent
"""One change of a worker's reusable blocks."""


class KvEventBatch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Events of one worker in order.

    Attributes:
        worker: Whose cache changed.
        events: Consecutive events; ids grow by one.
        block_size: Tokens a block; 0 if unknown.
        algorithm: Hash algorithm of the local hashes.
        timestamp_s: Unix time of the newest event.
        full_dump: True if this is the whole state as of the last event id, not a change.
    """

    worker: WorkerId
    events: tuple[KvEvent, ...] = ()
    block_size: int = 0
    algorithm: str = XXH3_1337_V1
    timestamp_s: float = 0.0
    full_dump: bool = False


class KvEventQuery(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks a worker for events ``first..last`` (both included); with ``first`` None for a full dump."""

    worker: WorkerId
    first: int | None = None
    last: int | None = None


class EventEnvelope(msgspec.Struct, frozen=True, array_like=True):
    """One event on the bus. Fields are append-only: the wire form is an array.

    Attributes:
        topic: Full topic name.
        publisher_id: Who published; unique per publisher.
        sequence: Grows by one per publisher and topic, from 1.
        payload: Encoded event; its schema is named by ``schema``.
        schema: ``dynamo.<type>.v1``.
        published_at_s: Unix time.
        headers: Trace context and the like.
    """

    topic: str
    publisher_id: int
    sequence: int
    payload: bytes
    schema: str = ""
    published_at_s: float = 0.0
    headers: dict[str, str] = {}


class SequenceGap(msgspec.Struct, frozen=True):
    """A subscriber missed events ``first..last`` of a publisher; they are lost unless replayed."""

    topic: str
    publisher_id: int
    first: int
    last: int
