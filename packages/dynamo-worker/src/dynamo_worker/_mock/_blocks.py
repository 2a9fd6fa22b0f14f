"""The mock's KV blocks as other workers see them: bytes that can be checked, over a link that takes its time."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.clock import Clock
from dynamo_core.errors import InvalidRequestError, UnsupportedOperationError
from dynamo_core.kv import BlockDescriptor, BlockLayout
from dynamo_worker._mock._block_pool import BlockPool

_HASH_BYTES = 8


class KvLink:
    """The way into a worker. What moves over it at the same time shares its bandwidth, first come, first served.

    Args:
        clock: Time.
        bytes_per_s: Bandwidth; 0 takes no time.
    """

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    async def move(self, size_bytes: int) -> None:
        """Take as long as that many bytes do. Cancelling ends the wait; the bandwidth is spent."""
        if self._bytes_per_s:
            now = self._clock.monotonic()
            self._free_at_s = max(self._free_at_s, now) + size_bytes / self._bytes_per_s
            await self._clock.sleep(self._free_at_s - now)


class MockBlocks:
    """Blocks of one rank, found, held and moved by content.

    The bytes of a block are its hash, again and again: few, so that a move costs no memory bandwidth, and such that a
    block which arrives under another block's name is noticed. Time passes as for the real number of bytes.

    Args:
        pool: Who holds which block.
        block_size: Tokens a block.
        bytes_per_token: Bytes that a token's KV would have.
        link: The way in.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, bytes_per_token: int, link: KvLink) -> None:
        self._pool = pool
        self._layout = BlockLayout(1, block_size, 1, _HASH_BYTES, "i8")
        self._moved_bytes = block_size * bytes_per_token
        self._link = link

    @property
    def layout(self) -> BlockLayout:
        """Shape of the bytes that stand for a block."""
        return self._layout

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        """Refused: the mock's blocks have no places, only contents."""
        raise _no_places()

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        """Refused: the mock's blocks have no places, only contents."""
        raise _no_places()

    def export(self, hashes: Sequence[int]) -> list[bytes]:
        """Return the bytes of the longest registered prefix."""
        return [self._content(value) for value in hashes[: self._pool.match(hashes)]]

    def read_into(self, hashes: Sequence[int], buffer: memoryview) -> int:
        """Copy the longest registered prefix to the start of a buffer; return how many blocks."""
        found = self.export(hashes)
        data = b"".join(found)
        buffer[: len(data)] = data
        return len(found)

    def match(self, hashes: Sequence[int]) -> int:
        """Return the length of the longest registered prefix."""
        return self._pool.match(hashes)

    def hold(self, hashes: Sequence[int]) -> int:
        """Hold the longest registered prefix; return its length."""
        count = self._pool.match(hashes)
        self._pool.hold(hashes[:count])
        return count

    def release(self, hashes: Sequence[int]) -> None:
        """Let go of held blocks."""
        self._pool.release(hashes, 0)

    async def bring_in(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> int:
        """Let blocks arrive; return how many of them, from the start, are there now.

        Raises:
            InvalidRequestError: if the bytes are not those of the blocks.
        """
        if len(blocks) != len(data):
            raise InvalidRequestError(f"{len(data)} pieces of KV bytes for {len(blocks)} blocks", param="data")
        for block, piece in zip(blocks, data, strict=True):
            if bytes(piece) != self._content(block.sequence_hash):
                raise InvalidRequestError(
                    f"the KV bytes of block {block.sequence_hash:x} are not its own", param="data"
                )
        await self._link.move(len(blocks) * self._moved_bytes)
        return self._store(blocks)

    def _store(self, blocks: Sequence[BlockDescriptor]) -> int:
        pool, hashes = self._pool, [block.sequence_hash for block in blocks]
        parents = [blocks[0].parent_hash] if blocks and blocks[0].parent_hash is not None else []
        if pool.match(parents) < len(parents):  # without its parents a block can never be found
            return 0
        known = pool.match(hashes)
        held = [*parents, *hashes[:known]]
        pool.hold(held)
        fresh = blocks[known : known + pool.free]
        pool.allocate(len(fresh))
        pool.register(fresh)
        pool.release([*held, *(block.sequence_hash for block in fresh)], 0)
        return known + len(fresh)

    def _content(self, sequence_hash: int) -> bytes:
        return sequence_hash.to_bytes(_HASH_BYTES, "little") * (self._layout.block_bytes // _HASH_BYTES)


def _no_places() -> UnsupportedOperationError:
    return UnsupportedOperationError("the mock engine has no KV memory; leave out --kv-connector")
