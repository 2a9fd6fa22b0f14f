"""The tokenizer inside a GGUF file as the ``tokenizer.json`` that the frontend reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_core.errors import ConfigurationError

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS % "{1,3}"
_QWEN2 = _WORDS % ""
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
}
_GPT2 = ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``.

    Raises:
        ConfigurationError: for a tokenizer of a kind that cannot be expressed; it names the remedy.
    """
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers or not metadata.get("tokenizer.ggml.tokens"):
        raise _unknown("tokenizer.ggml.model", kind)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata),
        **makers[kind](metadata),
        "post_processor": _post_processor(metadata),
    }


def tokenizer_config_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``: special tokens by role, and the chat template."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, name in roles.items():
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and index < len(tokens):
            config[role] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    return {**config, "chat_template": template} if template else config


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an output: of a text, of a turn, of a message."""
    found = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(int(index) for index in found if index is not None))


def control_token_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens that stand for no text."""
    return frozenset(index for index, kind in enumerate(_types(metadata)) if kind == _CONTROL)


def _types(metadata: Mapping[str, Any]) -> Sequence[int]:
    return metadata.get("tokenizer.ggml.token_type") or ()


def _added_tokens(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": index, "content": tokens[index], **plain, "normalized": False, "special": kind == _CONTROL}
        for index, kind in enumerate(_types(metadata))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _byte_level(metadata: Mapping[str, Any]) -> dict[str, Any]:
    model = _bpe_model(metadata, [entry.split(" ", 1) for entry in metadata.get("tokenizer.ggml.merges", ())])
    return {
        "normalizer": {"type": "NFC"} if metadata.get("tokenizer.ggml.pre") == "qwen2" else None,
        "pre_tokenizer": _pre_tokenizer(str(metadata.get("tokenizer.ggml.pre", "default"))),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            **model,
            "byte_fallback": False,
            "ignore_merges": metadata.get("tokenizer.ggml.pre") in ("llama-bpe",),
        },
    }


def _pre_tokenizer(name: str) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name in _GPT2:
        return {**level, "use_regex": True}
    if name in _SINGLE_DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, {**level, "use_regex": True}]}
    if name not in _PATTERNS:
        raise _unknown("tokenizer.ggml.pre", name)
    split = {"type": "Split", "pattern": {"Regex": _PATTERNS[name]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]}


def _sentencepiece(metadata: Mapping[str, Any]) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {**_bpe_model(metadata, _merges_by_score(metadata)), "byte_fallback": True, "fuse_unk": True},
    }


def _merges_by_score(metadata: Mapping[str, Any]) -> list[list[str]]:
    # SentencePiece joins the pair whose result scores best; a merge list in order of scores does the same.
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens), strict=False))
    ranks = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, int, int, list[str]]] = []
    for token, score in scores.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((-score, ranks[left], ranks[right], [left, right]))
    return [pair for *_, pair in sorted(found, key=lambda item: item[:3])]


def _bpe_model(metadata: Mapping[str, Any], merges: list[list[str]]) -> dict[str, Any]:
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": tokens[unknown] if unknown is not None else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }


def _post_processor(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    index = metadata.get("tokenizer.ggml.bos_token_id")
    default = metadata.get("tokenizer.ggml.model") == "llama"
    if index is None or not metadata.get("tokenizer.ggml.add_bos_token", default):
        return None
    token = metadata["tokenizer.ggml.tokens"][index]
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _unknown(key: str, value: object) -> ConfigurationError:
    return ConfigurationError(
        f"the GGUF file's {key} is {value!r}, which cannot be turned into a tokenizer.json here; "
        "give the folder of the original model's tokenizer with --tokenizer"
    )
