"""Measured engine profiles: reading their files and interpolating in them.

The file formats are those of NVIDIA Dynamo's profiler, so existing measurements load unchanged:
``selected_prefill_interpolation/raw_data.npz`` and ``selected_decode_interpolation/raw_data.npz``, or
``prefill_raw_data.json`` and ``decode_raw_data.json``. Interpolation needs scipy (extra ``profiles``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import ConfigurationError

Floats: TypeAlias = npt.NDArray[np.float64]

RESOLUTION = 100
PREFILL_FIELDS = ("prefill_isl", "prefill_ttft", "prefill_thpt_per_gpu")
DECODE_FIELDS = ("x_kv_usage", "y_context_length", "z_itl", "z_thpt_per_gpu", "max_kv_tokens")
_FILES = {
    "prefill": ("selected_prefill_interpolation/raw_data.npz", "prefill_raw_data.json"),
    "decode": ("selected_decode_interpolation/raw_data.npz", "decode_raw_data.json"),
}
CUBIC_POINTS = 4


class PrefillProfile:
    """Time to first token and prefill throughput by prompt length: cubic between points, clamped outside.

    Args:
        isl: Prompt lengths measured, tokens.
        ttft_ms: Time to first token at each.
        tokens_s_per_gpu: Prompt tokens a second and GPU at each.

    Raises:
        ConfigurationError: if the arrays do not fit each other or scipy is missing.
    """

    def __init__(self, isl: Sequence[float], ttft_ms: Sequence[float], tokens_s_per_gpu: Sequence[float]) -> None:
        lengths, times, rates = (
            np.asarray(item, dtype=np.float64).ravel() for item in (isl, ttft_ms, tokens_s_per_gpu)
        )
        if not (len(lengths) == len(times) == len(rates) > 0):
            raise ConfigurationError(
                f"prefill profile has {len(lengths)} lengths, {len(times)} times and {len(rates)} rates; "
                "they must be as many and at least one"
            )
        lengths, first = np.unique(lengths, return_index=True)
        self.min_isl, self.max_isl = float(lengths[0]), float(lengths[-1])
        self._ttft = _curve(lengths, times[first])
        self._rate = _curve(lengths, rates[first])

    def ttft_s(self, isl: float) -> float:
        """Return the time to first token of an unqueued prompt."""
        return float(self._ttft(self._clamped(isl))) / 1000

    def tokens_s_per_gpu(self, isl: float) -> float:
        """Return the prompt tokens a second and GPU."""
        return float(self._rate(self._clamped(isl)))

    def _clamped(self, isl: float) -> float:
        return max(self.min_isl, min(isl, self.max_isl))


class DecodeProfile:
    """Inter-token latency and decode throughput on a grid of KV use and context length.

    Scattered measurements become a 100 by 100 grid once, cubic inside their hull and nearest outside it; a query takes
    the nearest grid point.

    Args:
        kv_usage: Share of KV in use at each measurement.
        context_tokens: Mean context at each.
        itl_ms: Inter-token latency at each.
        tokens_s_per_gpu: Output tokens a second and GPU at each.
        max_kv_tokens: KV tokens the engine holds.

    Raises:
        ConfigurationError: if the arrays do not fit each other or scipy is missing.
    """

    def __init__(
        self,
        kv_usage: Sequence[float],
        context_tokens: Sequence[float],
        itl_ms: Sequence[float],
        *,
        tokens_s_per_gpu: Sequence[float],
        max_kv_tokens: float,
    ) -> None:
        arrays = [_flat(item) for item in (kv_usage, context_tokens, itl_ms, tokens_s_per_gpu)]
        sizes = {len(item) for item in arrays}
        if len(sizes) != 1 or 0 in sizes or not max_kv_tokens > 0:
            raise ConfigurationError(
                f"decode profile has arrays of {sorted(sizes)} points and max_kv_tokens {max_kv_tokens}; "
                "the arrays must be as long and not empty, and the tokens above 0"
            )
        usage, context, itl, rate = arrays
        self.max_kv_tokens = float(max_kv_tokens)
        self.max_context_tokens = float(context.max())
        self._itl_s = _grid(usage, context, itl) / 1000
        self._rate = _grid(usage, context, rate)

    def itl_s(self, concurrency: float, context_tokens: float) -> float:
        """Return the inter-token latency with that many requests of that mean context."""
        return float(self._itl_s[self._row(context_tokens), self._column(concurrency, context_tokens)])

    def tokens_s_per_gpu(self, concurrency: float, context_tokens: float) -> float:
        """Return the output tokens a second and GPU at that point."""
        return float(self._rate[self._row(context_tokens), self._column(concurrency, context_tokens)])

    def best_tokens_s_per_gpu(self, itl_s: float, context_tokens: float) -> float:
        """Return the throughput at the highest KV use whose latency is within the target.

        Measured latency need not be monotonic, so every column is looked at, from the fullest down; if none is within
        the target, the emptiest one answers.
        """
        row = self._row(context_tokens)
        within = np.flatnonzero(self._itl_s[row] <= itl_s)
        return float(self._rate[row, within[-1] if len(within) else 0])

    def _column(self, concurrency: float, context_tokens: float) -> int:
        return _nearest(concurrency * context_tokens / self.max_kv_tokens)

    def _row(self, context_tokens: float) -> int:
        return _nearest(context_tokens / self.max_context_tokens)


def load_prefill_profile(folder: Path) -> PrefillProfile:
    """Read a prefill profile.

    Raises:
        ConfigurationError: if there is none, or it cannot be read.
    """
    data = _read(folder, "prefill", PREFILL_FIELDS)
    return PrefillProfile(*(data[name] for name in PREFILL_FIELDS))


def load_decode_profile(folder: Path) -> DecodeProfile:
    """Read a decode profile.

    Raises:
        ConfigurationError: if there is none, or it cannot be read.
    """
    data = _read(folder, "decode", DECODE_FIELDS)
    usage, context, itl, rate, tokens = (data[name] for name in DECODE_FIELDS)
    # An array of one in npz, a number in JSON.
    limit = float(np.asarray(tokens, dtype=np.float64).ravel()[0])
    return DecodeProfile(usage, context, itl, tokens_s_per_gpu=rate, max_kv_tokens=limit)


def _read(folder: Path, kind: str, fields: Sequence[str]) -> dict[str, Any]:
    found = [folder / name for name in _FILES[kind] if (folder / name).is_file()]
    if not found:
        names = " or ".join(_FILES[kind])
        raise ConfigurationError(f"no {kind} profile in {folder}; it must hold {names}")
    path = found[0]
    try:
        data = _read_npz(path) if path.suffix == ".npz" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{kind} profile {path} cannot be read: {error}") from error
    missing = [name for name in fields if name not in data]
    if missing:
        raise ConfigurationError(f"{kind} profile {path} lacks {', '.join(missing)}; profile again")
    return data


def _read_npz(path: Path) -> dict[str, Any]:
    # Pickles stay refused: a profile is data, and may come from anywhere.
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _flat(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float64).ravel()


def _curve(points: Floats, values: Floats) -> Any:
    """Return a cubic through the points; through fewer than four, straight lines."""
    if len(points) < CUBIC_POINTS:
        return functools.partial(np.interp, xp=points, fp=values)
    return _scipy().make_interp_spline(points, values, k=3)


def _grid(usage: Floats, context: Floats, values: Floats) -> Floats:
    columns, rows = np.meshgrid(np.linspace(0, 1, RESOLUTION), np.linspace(0, context.max(), RESOLUTION))
    griddata = _scipy().griddata
    nearest = np.asarray(griddata((usage, context), values, (columns, rows), method="nearest"), dtype=np.float64)
    if not _spans_an_area(usage, context):
        return nearest
    cubic = np.asarray(griddata((usage, context), values, (columns, rows), method="cubic"), dtype=np.float64)
    return np.where(np.isnan(cubic), nearest, cubic)


def _spans_an_area(usage: Floats, context: Floats) -> bool:
    """Whether a triangle has the points as corners; measurements along one line have none."""
    scaled = np.column_stack([usage - usage[0], (context - context[0]) / max(context.max(), 1.0)])
    return len(usage) >= CUBIC_POINTS and int(np.linalg.matrix_rank(scaled, tol=1e-9)) == 2


def _nearest(share: float) -> int:
    return int(np.clip(np.round(share * (RESOLUTION - 1)), 0, RESOLUTION - 1))


def _scipy() -> Any:
    try:
        from scipy import interpolate
    except ImportError as error:
        raise ConfigurationError(
            "interpolating a measured profile needs scipy; install it with: pip install 'dynamo-planner[profiles]'"
        ) from error
    return interpolate
