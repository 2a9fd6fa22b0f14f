"""The KV events of vLLM and SGLang as they stand on the wire, read tolerantly.

A message is msgpack ``[timestamp, events, dp_rank?]``. An event is a map with its kind under ``type``, or an array
whose first element is the kind; releases add fields at the end of arrays and anywhere in maps. Block hashes are
integers (signed or not) or bytes, of which the last eight, big-endian, count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from dynamo_core.enums import Tier
from dynamo_core.errors import BackendProtocolError

_U64 = (1 << 64) - 1
_STORED_FIELDS = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
)
_FIELDS: dict[str, tuple[str, ...]] = {
    "BlockStored": _STORED_FIELDS,
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}
_TIERS = {
    "GPU": Tier.DEVICE,
    "DEVICE": Tier.DEVICE,
    "CPU": Tier.HOST,
    "CPU_PINNED": Tier.HOST,
    "CPU_TIER1": Tier.HOST,
    "CPU_TIER2": Tier.DISK,
    "DISK": Tier.DISK,
    "NVME": Tier.DISK,
    "STORAGE": Tier.DISK,
    "EXTERNAL": Tier.EXTERNAL,
    "NETWORK": Tier.EXTERNAL,
    "REMOTE": Tier.EXTERNAL,
    "SHARED": Tier.EXTERNAL,
}


@dataclass(frozen=True)
class Stored:
    """Consecutive blocks of one sequence were stored.

    Attributes:
        hashes: The engine's names of the blocks.
        parent: Name of the block before the first one.
        token_ids: Tokens of all blocks together.
        block_size: Tokens a block.
        tier: Where they lie.
        lora: Adapter under which they were computed.
    """

    hashes: tuple[int, ...]
    parent: int | None
    token_ids: tuple[int, ...]
    block_size: int
    tier: Tier = Tier.DEVICE
    lora: str = ""


@dataclass(frozen=True)
class Removed:
    """Blocks left a tier."""

    hashes: tuple[int, ...]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True)
class Cleared:
    """All blocks are gone."""


EngineEvent = Stored | Removed | Cleared


@dataclass(frozen=True)
class EngineBatch:
    """One message.

    Attributes:
        events: Events in order.
        dp_rank: Rank of the publisher; None if it does not say.
        num_unknown: Events of kinds that are not known here, left out.
    """

    events: tuple[EngineEvent, ...] = ()
    dp_rank: int | None = None
    num_unknown: int = field(default=0)


def decode_batch(payload: bytes) -> EngineBatch:
    """Read one message.

    Raises:
        BackendProtocolError: if it is not of this form.
    """
    try:
        raw = msgspec.msgpack.decode(payload)
        _, events, *rest = raw
        found = [_event(item) for item in events]
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, LookupError) as error:
        raise BackendProtocolError(f"the engine's KV event message cannot be read: {error!r}") from error
    known = tuple(event for event in found if event is not None)
    rank = rest[0] if rest and isinstance(rest[0], int) else None
    return EngineBatch(known, rank, len(found) - len(known))


def _event(item: Any) -> EngineEvent | None:
    kind, values = _kind_and_values(item)
    if kind == "BlockStored":
        lora = values.get("lora_name") or ""
        if not lora and values.get("lora_id") is not None:
            lora = f"lora-{values['lora_id']}"
        return Stored(
            tuple(_hash(value) for value in values["block_hashes"]),
            None if values.get("parent_block_hash") is None else _hash(values["parent_block_hash"]),
            tuple(int(token) for token in values["token_ids"]),
            int(values["block_size"]),
            _tier(values.get("medium")),
            str(lora),
        )
    if kind == "BlockRemoved":
        return Removed(tuple(_hash(value) for value in values["block_hashes"]), _tier(values.get("medium")))
    return Cleared() if kind == "AllBlocksCleared" else None


def _kind_and_values(item: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(item, Mapping):
        values = cast("Mapping[str, Any]", item)
        return str(values["type"]), values
    kind, *given = cast("Sequence[Any]", item)
    return str(kind), dict(zip(_FIELDS.get(str(kind), ()), given, strict=False))


def _hash(value: Any) -> int:
    if isinstance(value, bytes):
        return int.from_bytes(value[-8:], "big")
    return int(value) & _U64


def _tier(medium: Any) -> Tier:
    return Tier.DEVICE if medium is None else _TIERS.get(str(medium).upper(), Tier.UNKNOWN)
