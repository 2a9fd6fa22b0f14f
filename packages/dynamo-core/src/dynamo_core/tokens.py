"""Token sequences as bytes, and the one block-hash algorithm that every package shares.

Token ids travel and are hashed as packed little-endian u32, block hashes as packed little-endian u64. Both have
zero-copy integer views on little-endian machines, so no hot path builds lists of boxed integers.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from struct import Struct, iter_unpack
from typing import Literal, NewType

import msgspec
import xxhash

from dynamo_core.errors import InvalidRequestError

PackedTokens = NewType("PackedTokens", bytes)
"""Token ids, four bytes each, little-endian."""

PackedHashes = NewType("PackedHashes", bytes)
"""Block hashes, eight bytes each, little-endian."""

XXH3_1337_V1 = "xxh3-1337-v1"
"""Name of the block-hash algorithm of this release; two sides that name different ones must not be mixed."""

SEED = 1337
TOKEN_BYTES = 4
HASH_BYTES = 8
_U64 = (1 << 64) - 1
_PAIR = Struct("<QQ")
_SWAP = sys.byteorder == "big"
# "I" is 4 bytes and "Q" is 8 on every platform CPython supports; the import fails loudly should that ever change.
assert array("I").itemsize == TOKEN_BYTES
assert array("Q").itemsize == HASH_BYTES


def pack_tokens(token_ids: Iterable[int]) -> PackedTokens:
    """Pack token ids.

    Raises:
        InvalidRequestError: if an id is not in ``0..2**32-1``.
    """
    return PackedTokens(_pack("I", token_ids, "token id"))


def unpack_tokens(packed: PackedTokens | bytes) -> Sequence[int]:
    """View packed token ids as integers, without a copy where the machine is little-endian.

    Raises:
        InvalidRequestError: if the length is not a multiple of four.
    """
    return _unpack("I", packed, TOKEN_BYTES, "token ids")


def pack_hashes(hashes: Iterable[int]) -> PackedHashes:
    """Pack unsigned 64-bit block hashes.

    Raises:
        InvalidRequestError: if a hash is not in ``0..2**64-1``.
    """
    return PackedHashes(_pack("Q", hashes, "block hash"))


def unpack_hashes(packed: PackedHashes | bytes) -> Sequence[int]:
    """View packed block hashes as integers, without a copy where the machine is little-endian.

    Raises:
        InvalidRequestError: if the length is not a multiple of eight.
    """
    return _unpack("Q", packed, HASH_BYTES, "block hashes")


def token_count(packed: PackedTokens | bytes) -> int:
    """Number of tokens in a packed sequence."""
    return len(packed) // TOKEN_BYTES


class BlockHashes(msgspec.Struct, frozen=True):
    """Hashes of the full blocks of one sequence, first block first.

    Attributes:
        local: Content hash of each block alone.
        sequence: Chained hash: it identifies the block together with everything before it.
    """

    local: PackedHashes
    sequence: PackedHashes

    def __len__(self) -> int:
        return len(self.local) // HASH_BYTES


class BlockHasher(msgspec.Struct, frozen=True):
    """The named block-hash algorithm with its parameters.

    ``xxh3-1337-v1``: a block's local hash is XXH3-64 of its packed tokens (followed by its sorted multimodal hashes)
    under a seed of 1337, plus XXH3-64(lora, 0) if a LoRA is named, plus XXH3-64(salt, 1) if a cache salt is given,
    wrapping. The chain is ``sequence[0] = local[0]``, ``sequence[i] = XXH3-64(u64le(sequence[i-1]) ++ u64le(local[i]),
    1337)``. Only full blocks are hashed.

    Attributes:
        block_size: Tokens per block, at least 1.
        lora: Name of the LoRA adapter, or an empty string.
        salt: Cache salt that separates tenants, or an empty string.
        algorithm: Name of the algorithm.
    """

    block_size: int
    lora: str = ""
    salt: str = ""
    algorithm: str = XXH3_1337_V1

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InvalidRequestError(f"block_size {self.block_size} must be at least 1", param="block_size")
        require_algorithm(self.algorithm)

    @property
    def seed(self) -> int:
        """Seed of the local hash."""
        lora = xxhash.xxh3_64_intdigest(self.lora.encode(), 0) if self.lora else 0
        salt = xxhash.xxh3_64_intdigest(self.salt.encode(), 1) if self.salt else 0
        return (SEED + lora + salt) & _U64

    def hash_tokens(
        self,
        packed: PackedTokens | bytes,
        *,
        start_block: int = 0,
        parent: int | None = None,
        mm_hashes: Sequence[Sequence[int]] = (),
    ) -> BlockHashes:
        """Hash every full block from ``start_block`` on.

        A session that keeps its last sequence hash hashes only its new tail: pass that hash as ``parent`` and the
        number of blocks already hashed as ``start_block``.

        Args:
            packed: The whole sequence, packed.
            start_block: First block to hash.
            parent: Sequence hash of block ``start_block - 1``; required if ``start_block`` is above 0.
            mm_hashes: Per block (from block 0) the hashes of multimodal items that begin in it.

        Raises:
            InvalidRequestError: if ``parent`` is missing, or the packed length is not a multiple of four.
        """
        if start_block and parent is None:
            raise InvalidRequestError("hashing from a later block needs the parent sequence hash")
        if len(packed) % TOKEN_BYTES:
            raise InvalidRequestError(f"{len(packed)} bytes are no whole number of token ids")
        local = self._local_hashes(packed, start_block, mm_hashes)
        return BlockHashes(pack_hashes(local), pack_hashes(chain_hashes(local, parent)))

    def _local_hashes(
        self, packed: PackedTokens | bytes, start_block: int, mm_hashes: Sequence[Sequence[int]]
    ) -> list[int]:
        step = self.block_size * TOKEN_BYTES
        seed = self.seed
        digest = xxhash.xxh3_64_intdigest
        stop = len(packed) - len(packed) % step
        if not any(mm_hashes):
            blocks = memoryview(packed)[start_block * step : max(stop, start_block * step)]
            return [digest(block, seed) for (block,) in iter_unpack(f"{step}s", blocks)]
        extras = {i: pack_hashes(sorted(items)) for i, items in enumerate(mm_hashes) if items}
        return [
            digest(bytes(packed[i : i + step]) + extras.get(i // step, b""), seed)
            for i in range(start_block * step, stop, step)
        ]


def chain_hashes(local: Iterable[int], parent: int | None = None) -> list[int]:
    """Turn local hashes into sequence hashes, continuing after ``parent`` if one is given."""
    digest, pair = xxhash.xxh3_64_intdigest, _PAIR.pack
    found: list[int] = []
    values = iter(local)
    if parent is None:
        for parent in values:
            found.append(parent)
            break
        else:
            return found
    for value in values:
        parent = digest(pair(parent, value), SEED)
        found.append(parent)
    return found


def require_algorithm(name: str) -> None:
    """Refuse a hash algorithm other than this release's.

    Raises:
        InvalidRequestError: with the two names, since mixed hashes would silently never match.
    """
    if name != XXH3_1337_V1:
        raise InvalidRequestError(
            f"block hash algorithm {name!r} cannot be mixed with {XXH3_1337_V1!r}; "
            "use workers, routers and block managers that name the same algorithm",
            reason="request.hash_algorithm_mismatch",
            param="algorithm",
        )


def _pack(code: str, values: Iterable[int], what: str) -> bytes:
    try:
        packed = array(code, values)
    except (OverflowError, TypeError) as error:
        raise InvalidRequestError(f"{what} out of range or not an integer: {error}") from error
    if _SWAP:
        packed.byteswap()
    return packed.tobytes()


def _unpack(code: Literal["I", "Q"], packed: bytes, width: int, what: str) -> Sequence[int]:
    if len(packed) % width:
        raise InvalidRequestError(f"{len(packed)} bytes are no whole number of {what}")
    if not _SWAP:
        return memoryview(packed).cast(code)
    swapped = array(code)
    swapped.frombytes(packed)
    swapped.byteswap()
    return swapped
