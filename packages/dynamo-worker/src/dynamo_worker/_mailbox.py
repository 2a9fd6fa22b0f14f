"""A sink that an iterator reads: the pull form of an engine that pushes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from dynamo_core.errors import DynamoError
from dynamo_core.requests import GenerateChunk
from dynamo_core.tokens import PackedTokens


class Mailbox:
    """A ``ChunkSink`` that an iterator reads. Bounded by the request's own output."""

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
        """Wait for chunks; return one a choice, the one that carries the usage last. Cancelling loses nothing.

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
    texts = [chunk.text for chunk in chunks if chunk.text is not None]
    return msgspec.structs.replace(
        chunks[-1],
        token_ids=PackedTokens(b"".join(chunk.token_ids for chunk in chunks)),
        first_index=chunks[0].first_index,
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        text="".join(texts) if texts else None,
        parts=tuple(part for chunk in chunks for part in chunk.parts),
    )
