"""From references to content parts of a worker's request, with the hashes that make them part of a KV key."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dynamo_core.content import ContentPart
from dynamo_core.errors import DynamoError, InvalidRequestError
from dynamo_core.tokens import PackedTokens, unpack_tokens
from dynamo_frontend._media.fetch import Lookup, MediaFetcher, system_lookup
from dynamo_frontend._media.parts import MediaRef
from dynamo_frontend._media.policy import MediaLimits, check_url
from dynamo_frontend._metrics import MediaMetrics

PLACEHOLDERS = "media_placeholders"
TOKEN_INDEX = "token_index"
_INLINE_BYTES = 256 << 10


class MediaSource:
    """Brings the media of requests in.

    Args:
        limits: What a request's media may cost.
        metrics: Counts.
        lookup: Returns addresses of a host.
    """

    def __init__(self, limits: MediaLimits, metrics: MediaMetrics, lookup: Lookup = system_lookup) -> None:
        self.limits = limits
        self._metrics = metrics
        self._fetcher = MediaFetcher(limits, lookup)
        self._places = asyncio.Semaphore(limits.concurrency)

    async def load(self, refs: Sequence[MediaRef]) -> list[ContentPart]:
        """Return the parts of all items, in order. The first failure ends the others, cancelling does too.

        Raises:
            InvalidRequestError, UnsupportedMediaError: naming the item.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._counted(ref)) for ref in refs]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def close(self) -> None:
        """Close connections. Idempotent."""
        await self._fetcher.close()

    async def _counted(self, ref: MediaRef) -> ContentPart:
        try:
            async with self._places:
                part = await self._one(ref)
        except DynamoError:
            self._metrics.items.labels(kind=ref.kind.value, outcome="refused").inc()
            raise
        self._metrics.items.labels(kind=ref.kind.value, outcome="taken").inc()
        self._metrics.size_bytes.inc(len(part.data))
        return part

    async def _one(self, ref: MediaRef) -> ContentPart:
        metadata = {"detail": ref.detail} if ref.detail else {}
        media_type = ref.media_type
        if ref.encoded:
            limit = self.limits.max_bytes
            small = len(ref.encoded) <= _INLINE_BYTES
            data = ref.decode(limit) if small else await asyncio.to_thread(ref.decode, limit)
        elif self.limits.urls == "fetch":
            data, media_type = await self._fetch(ref)
        elif self.limits.urls == "pass":
            check_url(ref.url, ref.where, self.limits)
            return ContentPart(ref.kind, url=ref.url, content_hash=content_hash(ref.url.encode()), metadata=metadata)
        else:
            raise InvalidRequestError(
                f"{ref.where} is a URL; this server takes content inline only. Send it as a data: URL.",
                reason="request.media_forbidden",
                param=ref.where,
            )
        small = len(data) <= _INLINE_BYTES
        digest = content_hash(data) if small else await asyncio.to_thread(content_hash, data)
        return ContentPart(ref.kind, data=data, media_type=media_type, content_hash=digest, metadata=metadata)

    async def _fetch(self, ref: MediaRef) -> tuple[bytes, str]:
        try:
            return await self._fetcher.fetch(ref)
        except ModuleNotFoundError:
            raise InvalidRequestError(
                f"{ref.where} is a URL, and this server was installed without the extra 'media' that fetches them; "
                "send a data: URL.",
                reason="request.media_forbidden",
                param=ref.where,
            ) from None


def content_hash(data: bytes) -> int:
    """Return the 64-bit hash of content.

    A cryptographic one: callers share caches, and nobody must be able to make content that goes by another's hash.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def place_parts(
    parts: Sequence[ContentPart], prompt: PackedTokens, runtime_data: Mapping[str, Any]
) -> tuple[ContentPart, ...]:
    """Return the parts with the index of the prompt token at which each begins.

    The worker's card names the token that stands for an item of each kind (``media_placeholders`` in its runtime data).
    Without it, or with fewer such tokens than items, an item counts to the prompt's first token: a KV key then still
    tells equal media from different ones, but shares nothing before them.
    """
    named = runtime_data.get(PLACEHOLDERS)
    tokens = cast("dict[str, Any]", named) if isinstance(named, dict) else {}
    ids = unpack_tokens(prompt)
    cursors: dict[str, int] = {}
    placed: list[ContentPart] = []
    for part in parts:
        kind = part.kind.value
        place = _next(ids, tokens.get(kind), cursors.get(kind, 0))
        cursors[kind] = place + 1 if place is not None else len(ids)
        metadata = {**part.metadata, TOKEN_INDEX: place or 0}
        placed.append(
            ContentPart(
                part.kind,
                data=part.data,
                url=part.url,
                media_type=part.media_type,
                content_hash=part.content_hash,
                metadata=metadata,
            )
        )
    return tuple(placed)


def _next(ids: Sequence[int], token: Any, start: int) -> int | None:
    if not isinstance(token, int):
        return None
    return next((index for index in range(start, len(ids)) if ids[index] == token), None)


def block_media(parts: Sequence[ContentPart], block_size: int, blocks: int) -> list[list[int]]:
    """Return, for every block of a prompt, the hashes of the media that begin in it; empty without media."""
    if not any(part.content_hash is not None for part in parts):
        return []
    found: list[list[int]] = [[] for _ in range(blocks)]
    for part in parts:
        block = int(part.metadata.get(TOKEN_INDEX, 0)) // block_size
        if part.content_hash is not None and block < blocks:
            found[block].append(part.content_hash)
    return found
