"""Low-rank adapters in the layout of PEFT: ``y += up(down(x)) * scale`` beside the linear layers of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import ConfigurationError, InvalidRequestError, NotFoundError
from dynamo_worker._reference._config import ModelConfig
from dynamo_worker._reference._linear import Linear
from dynamo_worker._reference._safetensors import SafetensorsFile

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform")


@dataclass(frozen=True)
class _Target:
    """One adapted matrix: its place in a layer, and its columns in the fused product it is part of."""

    path: str
    fused: str
    first: int
    width: int
    height: int


@dataclass(frozen=True)
class _Pair:
    down: Linear
    up: Linear
    columns: slice


class LoraAdapter:
    """One loaded adapter.

    Args:
        name: Name under which requests ask for it.
        digest: Of its files; equal digests give equal KV.
        pairs: Matrices by layer and fused product.
    """

    def __init__(self, name: str, digest: str, pairs: Mapping[tuple[int, str], list[_Pair]]) -> None:
        self.name = name
        self.digest = digest
        self._pairs = pairs

    def add(self, layer: int, product: str, rows: Ints, given: Floats, out: Floats) -> None:
        """Add its part of a product to the rows that use it.

        Args:
            layer: Which layer.
            product: ``qkv``, ``out``, ``gate``, ``up`` or ``down``.
            rows: Their indices.
            given: Input of the product, all rows.
            out: Its result, all rows; changed in place.
        """
        for pair in self._pairs.get((layer, product), ()):
            out[rows, pair.columns] += pair.up(pair.down(given[rows]))


def load_adapter(name: str, folder: Path, config: ModelConfig) -> LoraAdapter:
    """Read an adapter. Blocks; belongs on a worker thread.

    Raises:
        NotFoundError: if the folder has no adapter.
        InvalidRequestError: if it does not fit the model, or uses what is not supported; it names the key.
    """
    try:
        text = (folder / CONFIG_FILE).read_bytes()
        weights = SafetensorsFile(folder / WEIGHTS_FILE)
    except (OSError, ConfigurationError) as error:
        raise NotFoundError(
            f"{folder} has no LoRA adapter ({CONFIG_FILE}, {WEIGHTS_FILE}): {error}", param="path"
        ) from error
    rank, scale = _read_config(folder, text)
    digest = hashlib.blake2b(text, digest_size=16)
    digest.update((folder / WEIGHTS_FILE).read_bytes())
    try:
        pairs = dict(_read_pairs(weights, config, rank, scale))
    except ConfigurationError as error:
        raise InvalidRequestError(f"adapter {folder} does not fit the model: {error.message}", param="path") from error
    if not pairs:
        raise InvalidRequestError(f"adapter {folder} adapts no matrix of this model", param="path")
    return LoraAdapter(name, digest.hexdigest(), pairs)


def _read_config(folder: Path, text: bytes) -> tuple[int, float]:
    try:
        raw: dict[str, Any] = json.loads(text)
        rank, alpha = int(raw["r"]), float(raw.get("lora_alpha", raw["r"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(f"{folder / CONFIG_FILE} cannot be used: {error!r}", param="path") from error
    used = [key for key in _UNSUPPORTED if raw.get(key)]
    if raw.get("peft_type", "LORA") != "LORA" or raw.get("bias", "none") != "none" or used or rank < 1:
        raise InvalidRequestError(
            f"{folder / CONFIG_FILE} uses {', '.join(used) or 'a type, bias or rank'} that the reference engine does "
            "not compute; give a plain LORA adapter",
            param="path",
        )
    return rank, alpha / (rank**0.5 if raw.get("use_rslora") else rank)


def _read_pairs(
    weights: SafetensorsFile, config: ModelConfig, rank: int, scale: float
) -> Iterator[tuple[tuple[int, str], list[_Pair]]]:
    names = set(weights)
    for layer in range(config.num_layers):
        found: dict[str, list[_Pair]] = {}
        for target in _targets(config):
            prefix = f"base_model.model.model.layers.{layer}.{target.path}."
            if f"{prefix}lora_A.weight" not in names:
                continue
            down = weights.read(f"{prefix}lora_A.weight", (rank, target.height))
            up = weights.read(f"{prefix}lora_B.weight", (target.width, rank)) * np.float32(scale)
            columns = slice(target.first, target.first + target.width)
            found.setdefault(target.fused, []).append(_Pair(Linear(down), Linear(up), columns))
        for fused, pairs in found.items():
            yield (layer, fused), pairs


def _targets(config: ModelConfig) -> list[_Target]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [
        _Target("self_attn.q_proj", "qkv", 0, queries, hidden),
        _Target("self_attn.k_proj", "qkv", queries, keys, hidden),
        _Target("self_attn.v_proj", "qkv", queries + keys, keys, hidden),
        _Target("self_attn.o_proj", "out", 0, hidden, queries),
        _Target("mlp.gate_proj", "gate", 0, inner, hidden),
        _Target("mlp.up_proj", "up", 0, inner, hidden),
        _Target("mlp.down_proj", "down", 0, hidden, inner),
    ]
