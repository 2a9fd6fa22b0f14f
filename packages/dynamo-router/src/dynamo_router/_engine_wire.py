"""The KV events that vLLM and SGLang publish by themselves, read into core's events.

A message is msgpack ``[time, events, dp rank?]``. An event is a map with its kind under ``type``, or an array that
begins with the kind; newer engines append fields to arrays and add keys to maps. A block hash is an integer, signed or
not, or bytes, whose last eight count, big-endian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import xxhash

from dynamo_core.enums import Tier
from dynamo_core.errors import BackendProtocolError
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent, UnknownKvEvent
from dynamo_core.tokens import BlockHasher, PackedHashes, pack_hashes, pack_tokens

_U64 = (1 << 64) - 1
_ARRAY_FIELDS: dict[str, tuple[str, ...]] = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
    ),
    "BlockRemoved": ("block_hashes", "medium"),
}
_MEDIA: dict[Tier, tuple[str, ...]] = {
    Tier.DEVICE: ("GPU", "DEVICE"),
    Tier.HOST: ("CPU", "CPU_PINNED", "CPU_TIER1"),
    Tier.DISK: ("CPU_TIER2", "DISK", "NVME", "STORAGE"),
    Tier.EXTERNAL: ("EXTERNAL", "NETWORK", "REMOTE", "SHARED"),
}
_TIER_OF = {medium: tier for tier, media in _MEDIA.items() for medium in media}
_UNREADABLE = (msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError)


class EngineMessage(msgspec.Struct, frozen=True):
    """A message taken apart as far as its events.

    Attributes:
        items: Events as they came.
        dp_rank: Rank that the message names; None if it names none.
    """

    items: Sequence[Any]
    dp_rank: int | None = None


def open_message(payload: bytes) -> EngineMessage:
    """Take a message apart.

    Raises:
        BackendProtocolError: if it is not of this form.
    """
    try:
        _, items, *rest = msgspec.msgpack.decode(payload)
        rank = rest[0] if rest and isinstance(rest[0], int) else None
        return EngineMessage(list(items), rank)
    except _UNREADABLE as error:
        raise BackendProtocolError(f"the engine's KV event message cannot be read: {error!r}") from error


def read_event(item: Any, event_id: int) -> tuple[KvEvent, int]:
    """Read one event; returns it with its block size, 0 if it names none.

    Raises:
        BackendProtocolError: if a known kind lacks a field, or its tokens do not fill its blocks.
    """
    try:
        kind, values = _named(item)
        if kind == "BlockStored":
            return _stored(values, event_id), int(values["block_size"])
        if kind == "BlockRemoved":
            return BlockRemoved(event_id, _hashes(values["block_hashes"]), _tier(values.get("medium"))), 0
    except BackendProtocolError:
        raise
    except _UNREADABLE as error:
        raise BackendProtocolError(f"the engine's KV event cannot be read: {error!r}") from error
    return (BlocksCleared(event_id) if kind == "AllBlocksCleared" else UnknownKvEvent(event_id, kind)), 0


def _stored(values: Mapping[str, Any], event_id: int) -> BlockStored:
    names, tokens, size = _hashes(values["block_hashes"]), values["token_ids"], int(values["block_size"])
    blocks = len(values["block_hashes"])
    if size < 1 or len(tokens) != blocks * size:
        raise BackendProtocolError(
            f"a stored event has {blocks} blocks of {size} tokens but {len(tokens)} tokens; the engine must "
            "publish full blocks"
        )
    lora = _lora(values)
    extras = _extras(values.get("extra_keys"), (lora, values.get("lora_id")))
    local = BlockHasher(size, lora=lora).hash_tokens(pack_tokens(tokens), mm_hashes=extras).local
    parent = values.get("parent_block_hash")
    return BlockStored(
        event_id, names, local, None if parent is None else _hash(parent), tier=_tier(values.get("medium")), lora=lora
    )


def _named(item: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(item, Mapping):
        values = cast("Mapping[str, Any]", item)
        return str(values["type"]), values
    kind, *given = cast("Sequence[Any]", item)
    return str(kind), dict(zip(_ARRAY_FIELDS.get(str(kind), ()), given, strict=False))


def _lora(values: Mapping[str, Any]) -> str:
    if values.get("lora_name"):
        return str(values["lora_name"])
    number = values.get("lora_id")
    return "" if number is None else f"lora-{number}"


def _extras(keys: Any, lora: tuple[Any, ...]) -> list[list[int]]:
    """Return a hash for each block that differs from its tokens alone, by an image or a salt.

    Such a block keeps its place in its chain and equals no block of plain text.
    """
    found: list[list[int]] = []
    for key in cast("Sequence[Any]", keys or ()):
        parts = [part for part in cast("Sequence[Any]", key or ()) if part not in lora]
        found.append([xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(parts))] if parts else [])
    return found


def _hashes(values: Sequence[Any]) -> PackedHashes:
    return pack_hashes([_hash(value) for value in values])


def _hash(value: Any) -> int:
    if isinstance(value, bytes):
        return int.from_bytes(value[-8:], "big")
    return int(value) & _U64


def _tier(medium: Any) -> Tier:
    return Tier.DEVICE if medium is None else _TIER_OF.get(str(medium).upper(), Tier.UNKNOWN)
