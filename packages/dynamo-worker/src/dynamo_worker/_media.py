"""Where media stand in a prompt, and how they enter the identity of its KV blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dynamo_core.content import ContentPart
from dynamo_core.errors import InvalidRequestError

TOKEN_INDEX = "token_index"
"""Metadata of a part: index of the prompt token at which it begins; the first one if the part does not say."""


def token_index(part: ContentPart) -> int:
    """Return the index of the prompt token that an item belongs to.

    Raises:
        InvalidRequestError: if it is no index.
    """
    index = part.metadata.get(TOKEN_INDEX, 0)
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise InvalidRequestError(f"parts has the {TOKEN_INDEX} {index!r}; give an index from 0 on", param="parts")
    return index


def content_hash(part: ContentPart) -> int:
    """Return the 64-bit hash of an item: the one it brings, or one of its bytes."""
    if part.content_hash is not None:
        return part.content_hash
    return int.from_bytes(hashlib.blake2b(part.data, digest_size=8).digest(), "little")


def media_of_blocks(parts: Sequence[ContentPart], block_size: int, blocks: int) -> list[list[int]]:
    """Return, for every block of a prompt, the hashes of the items that begin in it; empty without items.

    Raises:
        InvalidRequestError: if an item's place is no index.
    """
    if not parts:
        return []
    found: list[list[int]] = [[] for _ in range(blocks)]
    for part in parts:
        block = token_index(part) // block_size
        if block < blocks:
            found[block].append(content_hash(part))
    return found
