"""Rotary position embedding: tables once, rotation of queries and keys in each layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dynamo_worker._reference._config import RopeConfig

Floats = npt.NDArray[np.float32]


def rope_tables(config: RopeConfig, head_dim: int, context: int) -> tuple[Floats, Floats]:
    """Return cosines and sines, each ``[context, 1, head_dim // 2]``."""
    angles = np.outer(np.arange(context, dtype=np.float64), _frequencies(config, head_dim))[:, None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(heads: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate ``[rows, heads, head_dim]`` by the rows' angles; first and second half of a head form the pairs."""
    half = heads.shape[-1] // 2
    left, right = heads[..., :half], heads[..., half:]
    out = np.empty(heads.shape, dtype=np.float32)
    np.subtract(left * cos, right * sin, out=out[..., :half])
    np.add(right * cos, left * sin, out=out[..., half:])
    return out


def _frequencies(config: RopeConfig, head_dim: int) -> npt.NDArray[np.float64]:
    plain = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(plain, config)
    return plain


def _llama3(plain: npt.NDArray[np.float64], config: RopeConfig) -> npt.NDArray[np.float64]:
    # Short wavelengths stay, long ones are stretched by the factor, those between are blended.
    turns = config.original_context * plain / (2 * np.pi)
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / config.factor
