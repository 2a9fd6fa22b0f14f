"""The side of the connector that runs in vLLM's scheduler: which blocks the workers hold, what to load and store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_core.kv import BlockDescriptor
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_kvbm._vllm_connector.plan import Changes, Load, Plan, Store


class TrackedRequest:
    """A request's blocks: their hashes as far as its tokens go, and the ids that vLLM gave them.

    Args:
        request: vLLM's record; its tokens grow while it runs.
        block_size: Tokens a block.
    """

    def __init__(self, request: Any, block_size: int) -> None:
        self.block_ids: list[int] = []
        self.num_device_blocks = 0
        self.num_stored_blocks = 0
        self._request = request
        self._block_size = block_size
        lora = getattr(request.lora_request, "lora_name", "") if request.lora_request else ""
        self._hasher = BlockHasher(block_size, lora=lora, salt=request.cache_salt or "")
        self._blocks: list[BlockDescriptor] = []

    @property
    def is_text(self) -> bool:
        """Whether tokens alone say what its blocks hold."""
        return not self._request.mm_features and not getattr(self._request, "prompt_embeds", None)

    def blocks(self, count: int) -> list[BlockDescriptor]:
        """Return the first full blocks, at most ``count``."""
        tokens: Sequence[int] = self._request.all_token_ids
        have, stop = len(self._blocks), min(count, len(tokens) // self._block_size)
        if stop > have:
            packed = pack_tokens(tokens[have * self._block_size : stop * self._block_size])
            parent = self._blocks[-1].sequence_hash if have else None
            hashes = self._hasher.hash_tokens(packed, parent=parent)
            pairs = zip(unpack_hashes(hashes.local), unpack_hashes(hashes.sequence), strict=True)
            for position, (local, chained) in enumerate(pairs, have):
                self._blocks.append(BlockDescriptor(chained, local, parent, position))
                parent = chained
        return self._blocks[:stop]


class SchedulerSide:
    """Index of what all workers hold, and the plan of the step that is being scheduled.

    Args:
        block_size: Tokens a block.
        num_workers: Workers that each hold a share of every block.
    """

    def __init__(self, block_size: int, num_workers: int) -> None:
        self._block_size = block_size
        self._num_workers = num_workers
        self._holders: dict[int, int] = {}
        self._requests: dict[str, TrackedRequest] = {}
        self._loads: list[Load] = []
        self._is_clear = False

    def match(self, request: Any, num_computed_tokens: int) -> int:
        """Return how many tokens beyond the computed ones the workers hold, in whole blocks.

        At least one token of a prompt is left to compute, since its logits are what the step is for.
        """
        tracked = self._track(request)
        if num_computed_tokens % self._block_size or not tracked.is_text:
            return 0
        tracked.num_device_blocks = first = num_computed_tokens // self._block_size
        wanted = tracked.blocks((request.num_tokens - 1) // self._block_size)[first:]
        found = next((n for n, block in enumerate(wanted) if not self._holds(block.sequence_hash)), len(wanted))
        return found * self._block_size

    def allocated(self, request: Any, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """Take note of what was matched: it is to be loaded into the request's blocks after the computed ones."""
        tracked = self._track(request)
        count = num_external_tokens // self._block_size
        if not count:
            return
        # The request itself does not say yet what vLLM's own cache had of it: that is set once all is allocated.
        first = tracked.num_device_blocks
        hashes = tuple(block.sequence_hash for block in tracked.blocks(first + count)[first:])
        self._loads.append(Load(hashes, tuple(block_ids[first : first + count])))

    def plan(self, output: Any) -> Plan:
        """Return the step's plan and begin the next one."""
        stores: list[Store] = []
        scheduled: Mapping[str, int] = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            self._extend(new.req_id, new.block_ids, is_new=True)
            self._store(new.req_id, new.num_computed_tokens + scheduled[new.req_id], stores)
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            self._extend(name, cached.new_block_ids[index], is_new=name in cached.resumed_req_ids)
            self._store(name, cached.num_computed_tokens[index] + scheduled[name], stores)
        plan = Plan(self._loads, stores, self._is_clear)
        self._loads, self._is_clear = [], False
        return plan

    def apply(self, changes: Changes) -> None:
        """Take note of what the workers gained and lost."""
        for name, count in changes.gained.items():
            left = self._holders.get(name, 0) + count
            if left > 0:
                self._holders[name] = left
            else:
                self._holders.pop(name, None)

    def finished(self, request_id: str) -> None:
        """Forget a request."""
        self._requests.pop(request_id, None)

    def clear(self) -> None:
        """Forget every block, and have the workers do so."""
        self._holders.clear()
        self._is_clear = True

    def _holds(self, sequence_hash: int) -> bool:
        return self._holders.get(sequence_hash, 0) >= self._num_workers

    def _track(self, request: Any) -> TrackedRequest:
        return self._requests.setdefault(request.request_id, TrackedRequest(request, self._block_size))

    def _extend(self, name: str, groups: Sequence[Sequence[int]] | None, *, is_new: bool) -> None:
        tracked = self._requests.get(name)
        if tracked is None or groups is None:
            return
        if is_new:
            tracked.block_ids, tracked.num_stored_blocks = [], 0
        tracked.block_ids += groups[0]

    def _store(self, name: str, num_tokens: int, stores: list[Store]) -> None:
        tracked = self._requests.get(name)
        if tracked is None or not tracked.is_text:
            return
        first, full = tracked.num_stored_blocks, num_tokens // self._block_size
        missing = [
            (block, tracked.block_ids[block.position])
            for block in tracked.blocks(full)[first:]
            if not self._holds(block.sequence_hash)
        ]
        tracked.num_stored_blocks = max(first, full)
        if missing:
            stores.append(Store(tuple(block for block, _ in missing), tuple(index for _, index in missing)))
