"""Output that waits for a slow reader: token runs are merged, so a reader that comes back catches up in few items."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dynamo_core.requests import GenerateChunk
from dynamo_core.tokens import PackedTokens
from dynamo_core.wire import GENERATE_CHUNK

_ITEM_OVERHEAD_BYTES = 32


@dataclass(slots=True)
class _TokenRun:
    choice: int
    attempt: int
    first_index: int
    pieces: list[bytes]


class HeldOutput:
    """Chunks in order, with the bytes they take. Order is kept within a choice, which is all a receiver relies on."""

    def __init__(self) -> None:
        self._items: deque[bytes | _TokenRun] = deque()
        self._open_runs: dict[int, _TokenRun] = {}
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._items)

    def add(self, chunk: GenerateChunk) -> None:
        """Append a checked chunk, or extend the run before it if it brings tokens only."""
        if _is_plain(chunk):
            self._extend(chunk)
            return
        self._open_runs.pop(chunk.choice, None)
        encoded = GENERATE_CHUNK.encode(chunk)
        self._items.append(encoded)
        self.size_bytes += len(encoded) + _ITEM_OVERHEAD_BYTES

    def pop(self) -> bytes:
        """Remove the first item and return it encoded."""
        item = self._items.popleft()
        if isinstance(item, bytes):
            self.size_bytes -= len(item) + _ITEM_OVERHEAD_BYTES
            return item
        if self._open_runs.get(item.choice) is item:
            del self._open_runs[item.choice]
        tokens = PackedTokens(b"".join(item.pieces))
        self.size_bytes -= len(tokens) + _ITEM_OVERHEAD_BYTES
        return GENERATE_CHUNK.encode(GenerateChunk(tokens, item.first_index, item.choice, item.attempt))

    def clear(self) -> None:
        """Drop everything."""
        self._items.clear()
        self._open_runs.clear()
        self.size_bytes = 0

    def _extend(self, chunk: GenerateChunk) -> None:
        run = self._open_runs.get(chunk.choice)
        if run is None:
            run = _TokenRun(chunk.choice, chunk.attempt, chunk.first_index, [])
            self._open_runs[chunk.choice] = run
            self._items.append(run)
            self.size_bytes += _ITEM_OVERHEAD_BYTES
        run.pieces.append(chunk.token_ids)
        self.size_bytes += len(chunk.token_ids)


def _is_plain(chunk: GenerateChunk) -> bool:
    return (
        chunk.finish_reason is None
        and bool(chunk.token_ids)
        and not (chunk.logprobs or chunk.parts)
        and chunk.text is chunk.handoff is chunk.extra is chunk.usage is chunk.error is None
    )
