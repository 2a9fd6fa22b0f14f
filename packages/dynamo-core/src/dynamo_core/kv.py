"""KV blocks: their shape, where they lie, how they move, and who manages them behind an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.enums import Tier
from dynamo_core.errors import InvalidRequestError
from dynamo_core.tokens import XXH3_1337_V1

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


class BlockLayout(msgspec.Struct, frozen=True):
    """Shape of one block's KV bytes: C-order ``[layers, 2 (K, V), block_size, kv_heads, head_dim]``.

    Attributes:
        num_layers: Transformer layers.
        block_size: Tokens a block.
        kv_heads: KV heads on this rank.
        head_dim: Elements a head.
        dtype: Element type: f32, f16, bf16, f8 or i8.
        tp_rank: Which shard of the heads this is.
        tp_size: How many shards there are.
    """

    num_layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: str = "f32"
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise InvalidRequestError(f"KV dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}", param="dtype")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one block."""
        return (self.num_layers, 2, self.block_size, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "f8": 1, "i8": 1}
"""Bytes of one element of each KV dtype."""


class BlockDescriptor(msgspec.Struct, frozen=True, omit_defaults=True):
    """One full block by content.

    Attributes:
        sequence_hash: Chained hash; the block's identity.
        local_hash: Content hash of the block alone.
        parent_hash: Sequence hash of the block before; None at the start of a sequence.
        position: Index of the block in its sequence.
        priority: Retention priority; lower goes first.
    """

    sequence_hash: int
    local_hash: int = 0
    parent_hash: int | None = None
    position: int = 0
    priority: int = 0


class MatchResult(msgspec.Struct, frozen=True):
    """Longest prefix of a hash list that tiers hold together.

    Attributes:
        blocks: Matched blocks from the start of the list.
        tiers: Tier of each matched block, the nearest that holds it.
    """

    blocks: int = 0
    tiers: tuple[Tier, ...] = ()


class TransferRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Asks a peer for the bytes of blocks.

    Attributes:
        transfer_id: Identity, for logs and cancellation.
        sequence_hashes: Which blocks, in order.
        layout: Layout the receiver expects; a peer with another one refuses.
        algorithm: Hash algorithm of the sequence hashes.
        deadline_s: Seconds until the receiver gives up.
    """

    transfer_id: str
    sequence_hashes: tuple[int, ...]
    layout: BlockLayout
    algorithm: str = XXH3_1337_V1
    deadline_s: float | None = None


class BlockAccess(Protocol):
    """Reads and writes the KV bytes of an engine's device blocks.

    Methods run on the thread that runs the engine's steps, or while no step runs; the engine says which.
    """

    @property
    def layout(self) -> BlockLayout:
        """Shape of every block."""
        ...

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        """Copy blocks out, ``layout.block_bytes`` bytes each."""
        ...

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        """Copy blocks in.

        Raises:
            InvalidRequestError: if a piece has another size than ``layout.block_bytes``.
        """
        ...


@runtime_checkable
class BlockStore(Protocol):
    """Storage of one tier: content-addressed block bytes with bounded room. Methods block and run on a worker thread.

    A store may drop blocks to make room; ``put`` and ``get`` tell the truth at their time only.
    """

    @property
    def tier(self) -> Tier:
        """Which tier."""
        ...

    @property
    def capacity_blocks(self) -> int:
        """Most blocks it holds."""
        ...

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is present."""
        ...

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Store blocks and return the sequence hashes that were evicted for them, oldest first.

        A block already present is refreshed, not stored twice. What is returned is gone when this returns: a block
        that was pushed out and stored again by the same call is not in the list.

        Raises:
            InvalidRequestError: if there are more or fewer pieces of data than blocks.
        """
        ...

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the bytes of each block, None for those that are not there. Never wrong bytes."""
        ...

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Drop blocks; absent ones are ignored."""
        ...

    def close(self) -> None:
        """Release the memory or files. Idempotent."""
        ...


class TierChange(msgspec.Struct, frozen=True):
    """Blocks that entered and left a tier, for the worker to publish as KV events."""

    tier: Tier
    stored: tuple[BlockDescriptor, ...] = ()
    removed: tuple[int, ...] = ()


@runtime_checkable
class KvConnector(Protocol):
    """A block manager as an engine sees it.

    All methods run on the engine's step thread and must not wait for I/O longer than the transfer they are asked for.
    """

    def start(self, access: BlockAccess, on_change: Callable[[TierChange], None]) -> None:
        """Bind to an engine; ``on_change`` hears of every tier change and may be called from any thread."""
        ...

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        """Return how many blocks, from the start of the list, lower tiers hold. Changes nothing but recency."""
        ...

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        """Copy blocks into device blocks; return how many, from the start, arrived whole.

        The first miss or damaged block ends the copy: the engine computes from there.
        """
        ...

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Device blocks became full and shareable; the policy may offload them now."""
        ...

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Device blocks are about to be reused; the last chance to copy them out."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...

    def close(self) -> None:
        """Finish or cancel transfers and release storage. Idempotent."""
        ...


class BlockHints(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of the future of a request's blocks; each part may be unknown.

    Attributes:
        session_ended: No later turn will use them.
        next_turn_s: Seconds until a later turn is expected to use them; None if unknown.
        priority: Retention priority; lower goes first.
        retain_s: Seconds for which they should be kept whatever else is needed; a manager may bound it.
        tenant: Whose quota they count to.
    """

    session_ended: bool = False
    next_turn_s: float | None = None
    priority: int = 0
    retain_s: float | None = None
    tenant: str = ""


@runtime_checkable
class SupportsBlockHints(Protocol):
    """A connector that listens to hints."""

    def hint(self, sequence_hashes: Sequence[int], hints: BlockHints) -> None:
        """Say what is known of the blocks of one sequence, root first, whether they are in a lower tier yet or not.

        Called on the engine's step thread, at the latest when the request has ended. The last hint counts.
        """
        ...


@runtime_checkable
class SupportsPrefetch(Protocol):
    """A connector that can bring blocks near before a request needs them."""

    def prefetch(self, sequence_hashes: Sequence[int]) -> None:
        """Start to bring the longest held prefix near, for a request that waits in a queue. Returns at once.

        It is a hint: a connector that is busy may do nothing.
        """
        ...


class KvConnectorFactory(Protocol):
    """Entry of ``dynamo_core.kv_connectors``."""

    def __call__(self, *, options: Mapping[str, object], clock: Clock, metrics: Metrics) -> KvConnector:
        """Return a connector that is not yet bound to an engine.

        Raises:
            ConfigurationError: for an option it does not know.
        """
        ...
