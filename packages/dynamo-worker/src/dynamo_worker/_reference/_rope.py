"""Rotary position embedding: tables once, rotation of queries and keys in each layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dynamo_worker._reference._config import RopeConfig

Floats = npt.NDArray[np.float32]


def rope_tables(config: RopeConfig, head_dim: int, context: int) -> tuple[Floats, Floats]:
    """Return cosines ``[context, 1, 1, head_dim // 2]`` and sines ``[context, 1, 2, head_dim // 2]``.

    The sines are those that the halves of a head are multiplied with once they have changed places: negative for the
    second half, which comes first.
    """
    angles = np.outer(np.arange(context, dtype=np.float64), _frequencies(config, head_dim))[:, None, None, :]
    sines = np.sin(angles).astype(np.float32)
    return np.cos(angles).astype(np.float32), np.concatenate((-sines, sines), axis=2)


def rotate(heads: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate ``[rows, heads, head_dim]`` by the rows' angles; first and second half of a head form the pairs."""
    halves = heads.reshape(*heads.shape[:2], 2, -1)
    out = halves * cos
    out += halves[:, :, ::-1] * sin
    return out.reshape(heads.shape)


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
