"""The side of the connector that runs in each of vLLM's workers: copies between its KV cache and the tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockLayout, KvConnector, TierChange
from dynamo_kvbm._vllm_connector.plan import Changes, Plan

_KV = 2
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "i8", "int8": "i8", "float8_e4m3fn": "f8"}


class TensorBlocks:
    """vLLM's KV cache as ``BlockAccess``: one tensor a layer, whose first axis of the right length counts blocks.

    A block's bytes are those of its layers one after the other, each in the layer's own order.

    Args:
        torch: The module ``torch``.
        caches: Tensor of each layer.
        num_blocks: Blocks of the cache.
        block_size: Tokens a block.

    Raises:
        ConfigurationError: if the layers differ, or have no axis of blocks.
    """

    def __init__(self, torch: Any, caches: Mapping[str, Any], *, num_blocks: int, block_size: int) -> None:
        self._torch = torch
        self._layers = [_blocks_first(name, caches[name], num_blocks) for name in sorted(caches)]
        elements = {layer[0].numel() for layer in self._layers}
        kinds = {str(layer.dtype).removeprefix("torch.") for layer in self._layers}
        if len(elements) != 1 or len(kinds) != 1 or not kinds <= set(DTYPES):
            raise ConfigurationError(
                f"the layers of this model have KV blocks of {sorted(elements)} elements of {sorted(kinds)}; "
                "the block manager takes models whose layers are alike, use vLLM's own offloading for others"
            )
        (count,), (kind,) = elements, kinds
        self.layout = BlockLayout(len(self._layers), block_size, 1, count // (_KV * block_size), DTYPES[kind])

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        """Copy blocks out."""
        index = self._index(block_ids)
        flat = [layer.index_select(0, index).reshape(len(block_ids), -1) for layer in self._layers]
        gathered = self._torch.stack(flat, dim=1).contiguous().view(self._torch.uint8).cpu()
        rows = gathered.reshape(len(block_ids), -1).numpy()
        return [row.tobytes() for row in rows]

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        """Copy blocks in."""
        if not block_ids:
            return
        torch, first = self._torch, self._layers[0]
        raw = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8).view(first.dtype)
        pieces = raw.reshape(len(block_ids), len(self._layers), *first.shape[1:]).to(first.device)
        index = self._index(block_ids)
        for number, layer in enumerate(self._layers):
            layer.index_copy_(0, index, pieces[:, number])

    def _index(self, block_ids: Sequence[int]) -> Any:
        return self._torch.tensor(list(block_ids), dtype=self._torch.long, device=self._layers[0].device)


class WorkerSide:
    """Carries out plans.

    Args:
        connector: The tiers.
    """

    def __init__(self, connector: KvConnector) -> None:
        self._connector = connector
        self._gained: dict[int, int] = {}
        self._present: dict[int, int] = {}
        self._failed: set[int] = set()

    def bind(self, access: TensorBlocks) -> None:
        """Start the tiers on a cache."""
        self._connector.start(access, self._on_change)

    def load(self, plan: Plan) -> None:
        """Copy in what the plan says; blocks that did not arrive are told by ``take_failed``."""
        if plan.is_clear:
            self._connector.clear()
            self._gained.clear()  # the scheduler has forgotten all: what comes again must be told again
        for item in plan.loads:
            arrived = self._connector.onboard(item.sequence_hashes, item.block_ids)
            self._failed.update(item.block_ids[arrived:])

    def store(self, plan: Plan) -> None:
        """Offer what the step completed to the tiers."""
        for item in plan.stores:
            self._connector.on_register(item.blocks, item.block_ids)

    def take_changes(self) -> Changes | None:
        """Return what the tiers gained and lost since the last call; None for nothing."""
        gained, self._gained = self._gained, {}
        found = {name: count for name, count in gained.items() if count}
        return Changes(found) if found else None

    def take_failed(self) -> set[int]:
        """Return the blocks whose load failed since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def close(self) -> None:
        """Release the tiers."""
        self._connector.close()

    def _on_change(self, change: TierChange) -> None:
        # A block in two tiers counts once: it is gone when the last tier loses it.
        for block in change.stored:
            self._count(block.sequence_hash, 1)
        for name in change.removed:
            self._count(name, -1)

    def _count(self, name: int, step: int) -> None:
        before = self._present.get(name, 0)
        after = max(0, before + step)
        if after:
            self._present[name] = after
        else:
            self._present.pop(name, None)
        if (before > 0) != (after > 0):
            self._gained[name] = self._gained.get(name, 0) + (1 if after else -1)


def _blocks_first(name: str, cache: Any, num_blocks: int) -> Any:
    for axis, length in enumerate(cache.shape):
        if length == num_blocks:
            return cache.movedim(axis, 0)
    raise ConfigurationError(
        f"layer {name} has a KV cache of shape {tuple(cache.shape)} with no axis of {num_blocks} blocks; "
        "the block manager takes attention layers only"
    )
