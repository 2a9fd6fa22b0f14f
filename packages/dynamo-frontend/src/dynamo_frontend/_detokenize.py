"""Token ids to text, incrementally: whole characters leave as soon as they are complete."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_METASPACE = "\u2581"


class Detokenizer(Protocol):
    """Turns one choice's tokens into text. One instance per choice."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens, return the text that is now certain."""
        ...

    def finish(self) -> str:
        """Return what was held back, incomplete characters as U+FFFD."""
        ...


class ByteTable:
    """Bytes of every token of a tokenizer, for tokenizers whose decoding is concatenation of bytes.

    Attributes:
        pieces: Bytes by token id; empty for an id without a token.
        special: Ids of special tokens.
        strips_first_space: Whether the text's very first space is not part of it.
    """

    def __init__(self, pieces: list[bytes], special: frozenset[int], *, strips_first_space: bool) -> None:
        self.pieces = pieces
        self.special = special
        self.strips_first_space = strips_first_space
        self.visible = [b"" if index in special else piece for index, piece in enumerate(pieces)]

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes, special tokens included; empty for an unknown id."""
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else b""


class ByteDetokenizer:
    """Detokenizer over a byte table."""

    __slots__ = ("_decode", "_pieces", "_strip")

    def __init__(self, table: ByteTable, *, skip_special_tokens: bool) -> None:
        self._pieces = table.visible if skip_special_tokens else table.pieces
        self._decode = _Utf8Decoder("replace").decode
        self._strip = table.strips_first_space

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens, return the text that is now certain."""
        pieces = self._pieces
        try:
            data = pieces[token_ids[0]] if len(token_ids) == 1 else b"".join([pieces[token] for token in token_ids])
        except IndexError:
            data = b"".join([pieces[token] for token in token_ids if token < len(pieces)])
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._decode(data)

    def finish(self) -> str:
        """Return what was held back."""
        return self._decode(b"", True)


class StreamDetokenizer:
    """Detokenizer for any tokenizer, by the library's own stream."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens, return the text that is now certain."""
        found: list[str] = []
        for token in token_ids:
            self._ids.append(token)
            piece = self._stream.step(self._tokenizer, token)
            if piece:
                found.append(piece)
        text = "".join(found)
        self._sent += len(text)
        return text

    def finish(self) -> str:
        """Return what was held back."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)[self._sent :]


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer and knows the text of single tokens.

    Args:
        tokenizer: The tokenizer.
        spec: Its ``tokenizer.json`` as data, read from it if omitted.
    """

    def __init__(self, tokenizer: Tokenizer, spec: dict[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        known = spec if spec is not None else cast("dict[str, Any]", json.loads(tokenizer.to_str()))
        self.table = build_byte_table(tokenizer, known)

    def create(self, *, skip_special_tokens: bool) -> Detokenizer:
        """Return a detokenizer for one choice."""
        if self.table is not None:
            return ByteDetokenizer(self.table, skip_special_tokens=skip_special_tokens)
        return StreamDetokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, as logprobs show them."""
        if self.table is not None:
            return self.table.token_bytes(token_id)
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def build_byte_table(tokenizer: Tokenizer, spec: dict[str, Any]) -> ByteTable | None:
    """Return the byte table, or None if this tokenizer's decoder does more than join bytes."""
    decoder = spec.get("decoder") or {}
    added = {int(token["id"]): token for token in spec.get("added_tokens", ())}
    special = frozenset(index for index, token in added.items() if token["special"])
    if decoder.get("type") == "ByteLevel":
        return ByteTable(_pieces(tokenizer, _byte_level), special, strips_first_space=False)
    kinds = _decoder_kinds(decoder)
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        strips = kinds[-1] == "Strip"
        return ByteTable(_pieces(tokenizer, _metaspace), special, strips_first_space=strips)
    return None


def _decoder_kinds(decoder: dict[str, Any]) -> list[str]:
    parts = cast("list[dict[str, Any]]", decoder.get("decoders", ()))
    for part in parts:
        if part["type"] == "Replace" and (part["pattern"].get("String"), part["content"]) != (_METASPACE, " "):
            return []
        if part["type"] == "Strip" and (part["content"], part["start"], part["stop"]) != (" ", 1, 0):
            return []
    return [str(part["type"]) for part in parts]


def _pieces(tokenizer: Tokenizer, to_bytes: Callable[[str], bytes]) -> list[bytes]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, index in vocabulary.items():
        pieces[index] = to_bytes(text)
    return pieces


def _byte_level(text: str) -> bytes:
    alphabet = _byte_level_alphabet()
    try:
        return bytes([alphabet[char] for char in text])
    except KeyError:
        # An added token with characters outside the alphabet stands for itself.
        return text.encode()


def _metaspace(text: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(_METASPACE, " ").encode()


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Return the printable stand-ins that byte-level BPE uses for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    found.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return found
