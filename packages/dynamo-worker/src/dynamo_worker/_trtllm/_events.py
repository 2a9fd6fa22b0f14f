"""TensorRT-LLM's KV events, which it hands out as JSON objects, as reports for a ``KvEventSink``.

An event is ``{"event_id", "data", "window_size"?, "attention_dp_rank"?}``. Its data is ``created`` (how many blocks a
level has), ``stored`` (blocks with their tokens), ``removed`` (hashes) or ``updated`` (a block changed its level).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_core.engine import KvEventSink
from dynamo_core.enums import Tier
from dynamo_core.errors import BackendProtocolError
from dynamo_core.kv import BlockDescriptor
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes

_U64 = (1 << 64) - 1
_TIERS = (Tier.DEVICE, Tier.HOST)


class EventReader:
    """State of one rank: the blocks that TensorRT-LLM holds, bounded by its own cache.

    Args:
        sink: Where reports go.
        block_size: Tokens a block.
    """

    def __init__(self, sink: KvEventSink, block_size: int) -> None:
        self._sink = sink
        self._hasher = BlockHasher(block_size)
        self._block_size = block_size
        self._blocks: dict[int, tuple[BlockDescriptor, Tier]] = {}
        self._last_id: int | None = None
        self._window = 0

    def read(self, event: Mapping[str, Any]) -> None:
        """Report one event. After a hole in their numbers everything is reported gone, and known anew from there.

        Raises:
            BackendProtocolError: if it is not of this form.
        """
        try:
            self._count(int(event["event_id"]))
            data, window = event["data"], int(event.get("window_size") or 0)
            if data["type"] == "created":
                self._window = max(self._window, window)
            if window < self._window:
                return  # a layer group with a shorter window: what it drops, the others still hold
            self._apply(data)
        except (KeyError, TypeError, ValueError) as error:
            raise BackendProtocolError(f"TensorRT-LLM's KV event cannot be read: {error!r}") from error

    def _count(self, number: int) -> None:
        if self._last_id is not None and number != self._last_id + 1:
            self._blocks.clear()
            self._sink.cleared()
        self._last_id = number

    def _apply(self, data: Mapping[str, Any]) -> None:
        if data["type"] == "stored":
            self._store(data)
        elif data["type"] == "removed":
            self._remove([int(name) & _U64 for name in data["block_hashes"]])
        elif data["type"] == "updated" and data.get("cache_level"):
            self._move(int(data["block_hash"]) & _U64, _tier(data["cache_level"]["new_value"]))

    def _store(self, data: Mapping[str, Any]) -> None:
        parent = None if data.get("parent_hash") is None else int(data["parent_hash"]) & _U64
        if parent is not None and parent not in self._blocks:
            return  # its beginning was lost; nobody could find it
        for block in data["blocks"]:
            tokens = [int(token["token_id"]) for token in block["tokens"]]
            if len(tokens) != self._block_size:
                return  # the last one, not full yet; it comes again when it is
            name, tier = int(block["block_hash"]) & _U64, _tier(block.get("cache_level", 0))
            position = 0 if parent is None else self._blocks[parent][0].position + 1
            (content,) = unpack_hashes(self._hasher.hash_tokens(pack_tokens(tokens)).local)
            descriptor = BlockDescriptor(name, content, parent, position)
            self._blocks[name] = (descriptor, tier)
            self._sink.stored([descriptor], tier=tier)
            parent = name

    def _remove(self, names: list[int]) -> None:
        for name in names:
            known = self._blocks.pop(name, None)
            if known is not None:
                self._sink.removed([name], tier=known[1])

    def _move(self, name: int, tier: Tier) -> None:
        known = self._blocks.get(name)
        if known is None or known[1] is tier:
            return
        descriptor, before = known
        self._blocks[name] = (descriptor, tier)
        self._sink.stored([descriptor], tier=tier)
        self._sink.removed([name], tier=before)


def _tier(level: Any) -> Tier:
    return _TIERS[int(level)] if 0 <= int(level) < len(_TIERS) else Tier.UNKNOWN
