"""Tokenizers of the other kinds a GGUF file may hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from dynamo_core.errors import ConfigurationError
from dynamo_worker._llamacpp._tokenizer import control_token_ids, end_token_ids, tokenizer_config_json, tokenizer_json

PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{value:02X}>" for value in range(256)),
    "\u2581",
    "h",
    "e",
    "l",
    "o",
    "he",
    "ll",
]
PIECES += ["hell", "hello", "\u2581hello"]
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0, -5.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 9,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def load(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(metadata)))


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes() -> None:
    made = load(SENTENCEPIECE)
    found = made.encode("hello é")
    assert found.tokens == ["<s>", "\u2581hello", "\u2581", "<0xC3>", "<0xA9>"]
    assert made.decode(found.ids) == "hello é"
    assert (end_token_ids(SENTENCEPIECE), control_token_ids(SENTENCEPIECE)) == ((2,), {1, 2})
    assert tokenizer_config_json(SENTENCEPIECE)["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ", "1234"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", "Ġ", "123", "4"]),
        ("gpt-4o", ["ab", "Ġ", "123", "4"]),
    ],
)
def test_words_are_split_as_the_model_was_trained(pre: str, pieces: list[str]) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": ["a"]}
    splitter = load(metadata).pre_tokenizer
    found = [piece for piece, _ in splitter.pre_tokenize_str("ab 1234")]
    assert [piece.removeprefix("Ġ") or "Ġ" for piece in found] == [
        piece for piece in pieces if piece != "Ġ" or "Ġ" in found
    ]


@pytest.mark.parametrize("metadata", [{"tokenizer.ggml.model": "rwkv"}, {"tokenizer.ggml.pre": "unheard-of"}])
def test_what_cannot_be_said_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="--tokenizer"):
        tokenizer_json({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], **metadata})
