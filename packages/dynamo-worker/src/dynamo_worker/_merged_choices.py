"""The choices of one request, computed as streams of their own, in the order in which their output comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from dynamo_worker._output_builder import Delta


async def merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[Delta, None]:
    """Yield what several choices give, as it comes. What one raises ends all; leaving the iterator ends all."""
    arrived: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def read(source: AsyncIterator[Delta]) -> None:
        async for delta in source:
            arrived.put_nowait(delta)

    readers = [asyncio.ensure_future(read(source)) for source in streams]
    for reader in readers:
        reader.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        left = len(readers)
        while left:
            delta = await arrived.get()
            if delta is not None:
                yield delta
                continue
            left -= 1
            for reader in readers:
                if reader.done():
                    reader.result()
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
