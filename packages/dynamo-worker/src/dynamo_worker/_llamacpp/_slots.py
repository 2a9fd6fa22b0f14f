"""Which tokens each of llama.cpp's slots holds, and what that means for a router.

llama.cpp keeps the tokens of a slot's last request and computes only what the next one does not share with them. Every
completion here is told its slot, so that what a slot holds is known without asking.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from dynamo_core.kv import BlockDescriptor
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_worker._llamacpp._completion import Step

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from dynamo_core.engine import KvEventSink


class BlockReports:
    """Blocks that at least one slot holds, reported when the first comes and when the last goes.

    Args:
        block_size: Tokens a block.
    """

    def __init__(self, block_size: int) -> None:
        self._hasher = BlockHasher(block_size)
        self._holders: Counter[int] = Counter()
        self.sink: KvEventSink | None = None

    def blocks_of(self, tokens: Sequence[int]) -> list[BlockDescriptor]:
        """Return the full blocks of a sequence."""
        hashes = self._hasher.hash_tokens(pack_tokens(tokens))
        names, parent = unpack_hashes(hashes.sequence), None
        found: list[BlockDescriptor] = []
        for position, (name, content) in enumerate(zip(names, unpack_hashes(hashes.local), strict=True)):
            found.append(BlockDescriptor(name, content, parent, position))
            parent = name
        return found

    def replace(self, old: Sequence[BlockDescriptor], new: Sequence[BlockDescriptor]) -> None:
        """A slot holds other blocks than before."""
        shared = sum(1 for one, other in zip(old, new, strict=False) if one.sequence_hash == other.sequence_hash)
        gone = [name for block in reversed(old[shared:]) if self._leaves(name := block.sequence_hash)]
        come = [block for block in new[shared:] if self._comes(block.sequence_hash)]
        if gone and self.sink is not None:
            self.sink.removed(gone)
        if come and self.sink is not None:
            self.sink.stored(come)

    def _comes(self, name: int) -> bool:
        self._holders[name] += 1
        return self._holders[name] == 1

    def _leaves(self, name: int) -> bool:
        self._holders[name] -= 1
        if not self._holders[name]:
            del self._holders[name]
            return True
        return False


class Slot:
    """One slot of llama.cpp's.

    Args:
        index: Its number there.
        reports: Where its blocks are told.
    """

    def __init__(self, index: int, reports: BlockReports) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.last_use = 0
        self._reports = reports
        self._blocks: list[BlockDescriptor] = []
        self._prompt: Sequence[int] = ()
        self._output: list[int] = []

    def shared_with(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt it holds from the start."""
        return next(
            (at for at, (one, other) in enumerate(zip(self.tokens, prompt, strict=False)) if one != other),
            min(len(self.tokens), len(prompt)),
        )

    def begin(self, prompt: Sequence[int]) -> None:
        """A completion begins: llama.cpp drops what the slot does not share with it."""
        self._hold(self.tokens[: self.shared_with(prompt)])
        self._prompt, self._output = prompt, []

    def take(self, step: Step) -> None:
        """What llama.cpp says of the completion: how much it really found in the slot, and new tokens."""
        if step.cached_tokens is not None and step.cached_tokens < len(self.tokens) - 1:
            # Some models' caches cannot be cut anywhere. A prompt that is wholly there is computed from its last token.
            self._hold(self.tokens[: step.cached_tokens])
        if step.logprobs and not self._output:
            self._hold(list(self._prompt))
        self._output += [entry.token_id for entry in step.logprobs]

    def end(self) -> None:
        """The completion has ended, wherever: its newest token has been drawn but not computed."""
        if self._output:
            self._hold([*self._prompt, *self._output[:-1]])

    def _hold(self, tokens: list[int]) -> None:
        blocks = self._reports.blocks_of(tokens)
        self._reports.replace(self._blocks, blocks)
        self.tokens, self._blocks = tokens, blocks


class Slots:
    """All slots of a server.

    Args:
        count: How many there are.
        block_size: Tokens of a block that a router counts in.
    """

    def __init__(self, count: int, block_size: int) -> None:
        self.reports = BlockReports(block_size)
        self._idle = [Slot(index, self.reports) for index in range(count)]
        self._free = asyncio.Semaphore(count)
        self._uses = 0

    @asynccontextmanager
    async def held(self, prompt: Sequence[int]) -> AsyncGenerator[Slot, None]:
        """Wait for a slot and have it: the one that holds most of the prompt, else the one unused longest."""
        async with self._free:
            slot = max(self._idle, key=lambda one: (one.shared_with(prompt), -one.last_use))
            self._idle.remove(slot)
            self._uses += 1
            slot.last_use = self._uses
            slot.begin(prompt)
            try:
                yield slot
            finally:
                slot.end()
                self._idle.append(slot)
