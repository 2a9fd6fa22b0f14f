"""How chunks reach whoever asked. After an abort each choice gives one last chunk with what was computed by then."""

from __future__ import annotations

from dynamo_core.engine import ChunkSink
from dynamo_core.errors import DynamoError
from dynamo_core.requests import GenerateChunk
from dynamo_worker._mailbox import merge_chunks


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
