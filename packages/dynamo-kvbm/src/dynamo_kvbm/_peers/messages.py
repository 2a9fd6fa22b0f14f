"""What peers say to each other.

``peer_inventory`` answers with the hashes in a peer's host tier, then with every change, for as long as the caller
listens. ``peer_blocks`` takes core's ``TransferRequest`` and answers with blocks in the order asked for, each with its
header and checksum, cut into items anywhere; the first block that is not there ends the answer.
"""

from __future__ import annotations

import msgspec
import xxhash

from dynamo_core.errors import BackendProtocolError

INVENTORY_SCHEMA = "dynamo_kvbm.peer_inventory.v1"
COMPONENT = "kvbm"
INVENTORY_ENDPOINT = "peer_inventory"
BLOCKS_ENDPOINT = "peer_blocks"
BLOCKS_ADDRESS = "blocks_address"
BLOCKS_OF = "blocks_of"
ITEM_BYTES = 512 * 1024
"""Longest item; small enough for the frame limit of any plane."""


class InventoryChange(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that a peer's host tier gained and lost since the last change, which is all of them for the first."""

    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(InventoryChange)


def encode_change(change: InventoryChange) -> bytes:
    """Return the change as msgpack."""
    return _ENCODER.encode(change)


def decode_change(item: bytes) -> InventoryChange:
    """Read a change.

    Raises:
        BackendProtocolError: if it is none.
    """
    try:
        return _DECODER.decode(item)
    except msgspec.MsgspecError as error:
        raise BackendProtocolError(f"a peer's inventory cannot be read: {error}") from error


def identity_of(fingerprint: str) -> str:
    """Return the short form under which peers compare what their blocks are of."""
    return xxhash.xxh3_128_hexdigest(fingerprint.encode())
