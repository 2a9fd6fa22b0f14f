"""Made-up tokens: a function of (prompt, choice, position) alone, so any worker continues any other's output."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import xxhash

from dynamo_core.errors import ConfigurationError

_WORD = re.compile(r"[Ġ▁]?[A-Za-z]+")
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = 0xBF58476D1CE4E5B9
_U64 = (1 << 64) - 1
FIRST_PLAIN_ID = 3


class Vocabulary:
    """The token ids that the mock draws from.

    Args:
        ids: Ids to draw from; none of them ends an output.
        size: Size of the whole vocabulary.
        eos: Ids that end an output.
    """

    def __init__(self, ids: Sequence[int], *, size: int, eos: Sequence[int]) -> None:
        self._ids = list(ids)
        self.size = size
        self.eos = tuple(eos)

    @classmethod
    def plain(cls, size: int) -> Vocabulary:
        """Ids from 3 on; 2 ends an output."""
        return cls(range(FIRST_PLAIN_ID, size), size=size, eos=(2,))

    @classmethod
    def of_model(cls, folder: Path) -> Vocabulary:
        """Words of the folder's tokenizer, so that the output can be read.

        Raises:
            ConfigurationError: if the folder has no readable ``tokenizer.json`` and ``config.json``.
        """
        tokenizer = _read_json(folder / "tokenizer.json")
        config = _read_json(folder / "config.json")
        vocab = cast("dict[str, int]", tokenizer.get("model", {}).get("vocab", {}))
        added = {int(token["id"]) for token in tokenizer.get("added_tokens", [])}
        words = sorted(i for text, i in vocab.items() if i not in added and _WORD.fullmatch(text))
        if not words:
            raise ConfigurationError(f"{folder / 'tokenizer.json'} has no word tokens; leave out --model")
        eos: object = config.get("eos_token_id", [])
        ids = cast("list[int]", eos) if isinstance(eos, list) else [cast("int", eos)]
        return cls(words, size=int(config.get("vocab_size", max(words) + 1)), eos=ids)

    def key(self, prompt: bytes, choice: int) -> int:
        """Return what names one output: 64 bits of prompt and choice."""
        return xxhash.xxh3_64_intdigest(prompt, choice)

    def token(self, key: int, position: int) -> int:
        """Return the token at a position of an output."""
        mixed = ((key + position * _GOLDEN) & _U64) * _MIX & _U64
        return self._ids[(mixed >> 33) % len(self._ids)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--model: cannot read {path}: {error}; give a model folder") from error
