"""Text to token ids: cached by piece, and off the event loop when it is long."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from dynamo_core.errors import ConfigurationError
from dynamo_core.tokens import PackedTokens, pack_tokens

_ENTRY_BYTES = 200


class TokenCache:
    """Token ids of recently seen text, bounded by memory; the least recently used text goes first.

    Args:
        capacity_bytes: Most memory for texts and ids together.
        on_size: Told the memory in use after each change.
    """

    def __init__(self, capacity_bytes: int, on_size: Callable[[int], None] = lambda size: None) -> None:
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0
        self._on_size = on_size
        self._entries: OrderedDict[tuple[int, str], PackedTokens] = OrderedDict()

    def get(self, owner: int, text: str) -> PackedTokens | None:
        """Return the ids of a text under one tokenizer, or None."""
        found = self._entries.get((owner, text))
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end((owner, text))
        return found

    def put(self, owner: int, text: str, packed: PackedTokens) -> None:
        """Remember the ids of a text."""
        cost = _ENTRY_BYTES + len(text) + len(packed)
        if cost > self.capacity_bytes // 4 or (owner, text) in self._entries:
            return
        self._entries[(owner, text)] = packed
        self.size_bytes += cost
        while self.size_bytes > self.capacity_bytes:
            (_, old_text), old = self._entries.popitem(last=False)
            self.size_bytes -= _ENTRY_BYTES + len(old_text) + len(old)
        self._on_size(self.size_bytes)

    def forget(self, owner: int) -> None:
        """Drop all texts of one tokenizer."""
        for key in [key for key in self._entries if key[0] == owner]:
            packed = self._entries.pop(key)
            self.size_bytes -= _ENTRY_BYTES + len(key[1]) + len(packed)
        self._on_size(self.size_bytes)


class TextTokenizer:
    """A model's tokenizer with its cache.

    Where the tokenizer splits at special tokens before anything else, the text is cached in pieces that begin with
    one: a conversation's earlier turns are found again whatever follows them.

    Args:
        tokenizer: The Hugging Face tokenizer.
        cache: Shared by all models.
        inline_chars: Longest uncached text that is tokenised on the event loop.
    """

    def __init__(self, tokenizer: Tokenizer, cache: TokenCache, *, inline_chars: int) -> None:
        self.tokenizer = tokenizer
        self.spec = cast("dict[str, Any]", json.loads(tokenizer.to_str()))
        self._cache = cache
        self._inline_chars = inline_chars
        self._splitter = _piece_splitter(self.spec)

    async def encode(self, text: str, *, add_special_tokens: bool) -> PackedTokens:
        """Return the token ids of a text. Cancellation abandons the result, not the work."""
        pieces = self._pieces(text, add_special_tokens)
        found = [self._cache.get(id(self), piece) for piece in pieces]
        missing = [index for index, packed in enumerate(found) if packed is None]
        if missing:
            texts = [pieces[index] for index in missing]
            if sum(map(len, texts)) > self._inline_chars:
                loop = asyncio.get_running_loop()
                fresh = await loop.run_in_executor(None, self._encode_all, texts, add_special_tokens)
            else:
                fresh = self._encode_all(texts, add_special_tokens)
            for index, packed in zip(missing, fresh, strict=True):
                found[index] = packed
                self._cache.put(id(self), pieces[index], packed)
        return PackedTokens(b"".join(packed for packed in found if packed is not None))

    def close(self) -> None:
        """Give the cache's room back."""
        self._cache.forget(id(self))

    def _pieces(self, text: str, add_special_tokens: bool) -> list[str]:
        if add_special_tokens and self.spec.get("post_processor") is not None:
            # Whole texts with added tokens never meet pieces without: the mark keeps their keys apart.
            return ["\0" + text]
        if self._splitter is None:
            return [text]
        return [piece for piece in self._splitter.split(text) if piece] or [""]

    def _encode_all(self, texts: list[str], add_special_tokens: bool) -> list[PackedTokens]:
        # Only the batch form gives up the interpreter's lock while it works: with the plain one, a thread that
        # tokenises a long text stops the event loop all the same.
        encode = self.tokenizer.encode_batch_fast
        return [
            pack_tokens(encode([text.removeprefix("\0")], add_special_tokens=add_special_tokens)[0].ids)
            for text in texts
        ]


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        ConfigurationError: if it cannot be read.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a bad file
        raise ConfigurationError(f"tokenizer {path} cannot be read: {error}") from error


def _piece_splitter(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Return a pattern that cuts before each special token, if cutting there cannot change the ids.

    It cannot where special tokens are matched on the raw text, strip nothing around them, and nothing is put before
    the first word of a text.
    """
    if _prepends(spec.get("normalizer")) or _prepends(spec.get("pre_tokenizer")) or spec.get("truncation"):
        return None
    tokens = [token for token in spec.get("added_tokens", ()) if token["special"]]
    exact = [t for t in tokens if not (t["normalized"] or t["lstrip"] or t["rstrip"] or t["single_word"])]
    if not exact:
        return None
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in spec["added_tokens"]):
        return None
    names = sorted((re.escape(token["content"]) for token in exact), key=len, reverse=True)
    return re.compile(f"(?={'|'.join(names)})")


def _prepends(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    fields = cast("dict[str, Any]", part)
    if fields.get("type") in ("Prepend", "Metaspace") or fields.get("add_prefix_space"):
        return True
    inner = [*fields.get("pretokenizers", ()), *fields.get("normalizers", ())]
    return any(_prepends(item) for item in inner)
