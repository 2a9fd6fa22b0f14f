"""Shape of a Llama-architecture model, read from its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dynamo_core.errors import ConfigurationError

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the frequencies.
        kind: ``default``, ``linear`` or ``llama3``.
        factor: How many times the context was stretched.
        low_freq_factor: llama3: wavelengths above original context / this are stretched fully.
        high_freq_factor: llama3: wavelengths below original context / this are left alone.
        original_context: llama3: context length before stretching, tokens.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know about a model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    rope: RopeConfig = field(default_factory=RopeConfig)

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` and, for the end tokens, ``generation_config.json``.

        Raises:
            ConfigurationError: for a missing or unsupported configuration; it names the file, the key and the value.
        """
        path = folder / "config.json"
        raw = _read_json(path)
        _require_supported(path, raw)
        generation = folder / "generation_config.json"
        eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
        try:
            config = _from_json(raw, eos)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"--model: {path} lacks or mistypes a key: {error!r}; repair it") from error
        _require_consistent(path, config)
        return config


def _from_json(raw: Mapping[str, Any], eos: Any) -> ModelConfig:
    heads = int(raw["num_attention_heads"])
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        max_context=int(raw.get("max_position_embeddings", 2048)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=_token_ids(eos if eos is not None else raw.get("eos_token_id")),
        rope=_rope(raw),
    )


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    # Newer configurations hold everything in rope_parameters, older ones split it in two keys.
    section: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = str(section.get("rope_type") or section.get("type") or "default")
    if kind not in ("default", "linear", "llama3"):
        raise ConfigurationError(
            f"--model: rope type {kind!r} is not supported; the reference engine knows default, linear and llama3"
        )
    return RopeConfig(
        theta=float(section.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(section.get("factor", 1.0)),
        low_freq_factor=float(section.get("low_freq_factor", 1.0)),
        high_freq_factor=float(section.get("high_freq_factor", 4.0)),
        original_context=int(section.get("original_max_position_embeddings", 8192)),
    )


_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "attention_bias": bool,
    "mlp_bias": bool,
    "quantization_config": bool,
    "hidden_act": lambda value: value not in (None, "silu"),
}
"""Configuration keys with values under which the forward pass would silently be wrong."""


def _require_supported(path: Path, raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures") or []
    if ARCHITECTURE not in architectures:
        raise ConfigurationError(
            f"--model: {path} names the architectures {architectures}; the reference engine runs {ARCHITECTURE} only, "
            "use another --engine for this model"
        )
    for key, is_unsupported in _UNSUPPORTED.items():
        if is_unsupported(raw.get(key)):
            raise ConfigurationError(
                f"--model: {path} has {key} = {raw[key]!r}, which the reference engine does not compute; "
                "use another --engine for this model"
            )


def _require_consistent(path: Path, config: ModelConfig) -> None:
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.max_context)
    if min(*sizes, config.num_heads, config.num_kv_heads, config.head_dim) < 1:
        raise ConfigurationError(f"--model: {path} has a size below 1; repair it")
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ConfigurationError(
            f"--model: {path}: {config.num_heads} heads must be a multiple of {config.num_kv_heads} KV heads "
            f"and head_dim {config.head_dim} must be even"
        )


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(cast("list[int]", value)) if isinstance(value, list) else (int(value),)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"--model: {path} cannot be read ({error.strerror}); give a folder in Hugging Face layout, or `tinylm`"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"--model: {path} is not JSON ({error}); repair it") from error
    if not isinstance(loaded, dict):
        raise ConfigurationError(f"--model: {path} is not a JSON object; repair it")
    return cast("dict[str, Any]", loaded)
