"""A block in one piece of bytes, as it lies in an object and travels between peers.

The header carries a checksum that is seeded with the block's identity: bytes that are cut, damaged, or of another block
are never taken for it.
"""

from __future__ import annotations

import struct

import xxhash

from dynamo_core.kv import BlockDescriptor

HEADER = struct.Struct("<8sQQQQIIQ")
"""Magic, sequence hash, local hash, parent hash, payload bytes, position, flags, checksum of the payload."""

MAGIC = b"DYNKVB01"
HAS_PARENT = 1


def packed_block(block: BlockDescriptor, data: bytes | memoryview) -> bytes:
    """Return a block with a header that says which it is."""
    checksum = xxhash.xxh3_64_intdigest(data, block.sequence_hash)
    flags = 0 if block.parent_hash is None else HAS_PARENT
    header = HEADER.pack(
        MAGIC,
        block.sequence_hash,
        block.local_hash,
        block.parent_hash or 0,
        len(data),
        block.position,
        flags,
        checksum,
    )
    return b"".join((header, data))


def unpacked_block(sequence_hash: int, body: memoryview) -> tuple[BlockDescriptor, memoryview] | None:
    """Return a block, or None if the bytes are not whole, or not that block."""
    if len(body) < HEADER.size:
        return None
    magic, identity, local, parent, size, position, flags, checksum = HEADER.unpack_from(body)
    data = body[HEADER.size :]
    if magic != MAGIC or identity != sequence_hash or size != len(data):
        return None
    if xxhash.xxh3_64_intdigest(data, sequence_hash) != checksum:
        return None
    return BlockDescriptor(identity, local, parent if flags & HAS_PARENT else None, position), data
