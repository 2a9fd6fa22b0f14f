"""How chunks reach whoever asked: pushed to a sink, or pulled through an iterator.

The engine may be a few steps ahead of its reader. What piled up is handed over as one chunk a choice, and after an
abort each choice gives one last chunk that ends it and carries what was computed until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from dynamo_core.engine import ChunkSink
from dynamo_core.errors import DynamoError
from dynamo_core.requests import GenerateChunk
from dynamo_core.tokens import PackedTokens


class Delivery:
    """Passes the chunks of one request to its sink, on the event loop."""

    def __init__(self, sink: ChunkSink) -> None:
        self.is_aborted = False
        self._sink = sink
        self._held: dict[int, list[GenerateChunk]] = {}

    def push(self, chunk: GenerateChunk) -> None:
        """Pass a chunk on; after an abort, only with the choice's last one."""
        if self.is_aborted:
            held = self._held.setdefault(chunk.choice, [])
            held.append(chunk)
            if chunk.finish_reason is None:
                return
            chunk = merge_chunks(held)
        self._sink.push(chunk)

    def fail(self, error: DynamoError) -> None:
        """Pass an error on."""
        self._sink.fail(error)


class Mailbox:
    """A sink that an iterator reads. Bounded by the request's own output."""

    def __init__(self) -> None:
        self._pending: dict[int, list[GenerateChunk]] = {}
        self._error: DynamoError | None = None
        self._arrived = asyncio.Event()

    def push(self, chunk: GenerateChunk) -> None:
        """Keep a chunk."""
        self._pending.setdefault(chunk.choice, []).append(chunk)
        self._arrived.set()

    def fail(self, error: DynamoError) -> None:
        """Keep the error for after the chunks."""
        self._error = error
        self._arrived.set()

    async def take(self) -> list[GenerateChunk]:
        """Wait for chunks; return one a choice, the one that carries the usage last.

        Raises:
            DynamoError: what ended the request, once its chunks are taken.
        """
        await self._arrived.wait()
        pending, self._pending = self._pending, {}
        if self._error is not None and not pending:
            raise self._error
        if self._error is None:
            self._arrived.clear()
        merged = [merge_chunks(chunks) for chunks in pending.values()]
        return sorted(merged, key=lambda chunk: chunk.usage is not None)


def merge_chunks(chunks: Sequence[GenerateChunk]) -> GenerateChunk:
    """Return consecutive chunks of one choice as one."""
    if len(chunks) == 1:
        return chunks[0]
    return msgspec.structs.replace(
        chunks[-1],
        token_ids=PackedTokens(b"".join(chunk.token_ids for chunk in chunks)),
        first_index=chunks[0].first_index,
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
    )
