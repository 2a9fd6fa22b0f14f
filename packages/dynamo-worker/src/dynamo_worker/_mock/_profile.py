"""Measured step times from a file, in place of the built-in fits.

The file is npz or JSON with these arrays, each axis rising: ``prefill_isl`` (tokens) and ``prefill_ttft_ms``;
``decode_active_kv_tokens`` and ``decode_context_length`` (both tokens), and ``decode_itl`` in milliseconds with a row
for each of the first and a column for each of the second. Between points time is linear, beyond them constant.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dynamo_core.errors import ConfigurationError

KEYS = ("prefill_isl", "prefill_ttft_ms", "decode_active_kv_tokens", "decode_context_length", "decode_itl")


@dataclass(frozen=True)
class TimingProfile:
    """Tables of one file."""

    prefill_tokens: Sequence[float]
    prefill_ms: Sequence[float]
    active_tokens: Sequence[float]
    context_tokens: Sequence[float]
    decode_ms: Sequence[Sequence[float]]

    @classmethod
    def load(cls, path: Path) -> TimingProfile:
        """Read a file. Blocks.

        Raises:
            ConfigurationError: naming the path, the array and the remedy.
        """
        try:
            arrays = _read(path)
            profile = cls(
                _floats(arrays["prefill_isl"]),
                _floats(arrays["prefill_ttft_ms"]),
                _floats(arrays["decode_active_kv_tokens"]),
                _floats(arrays["decode_context_length"]),
                [_floats(row) for row in arrays["decode_itl"]],
            )
        except (OSError, ValueError, TypeError) as error:
            raise _refusal(path, f"cannot be read: {error}") from error
        except KeyError as error:
            raise _refusal(path, f"has no array {error}") from error
        profile._check(path)
        return profile

    def prefill(self, tokens: int) -> float:
        """Milliseconds to compute that many prompt tokens in one step."""
        low, high, share = _place(self.prefill_tokens, tokens)
        return _between(self.prefill_ms[low], self.prefill_ms[high], share)

    def decode(self, active_tokens: float, context_tokens: float) -> float:
        """Milliseconds of a decode step with that many tokens in the KV cache, and sequences of that mean length."""
        top, bottom, down = _place(self.active_tokens, active_tokens)
        left, right, along = _place(self.context_tokens, context_tokens)
        rows = [_between(self.decode_ms[row][left], self.decode_ms[row][right], along) for row in (top, bottom)]
        return _between(rows[0], rows[1], down)

    def _check(self, path: Path) -> None:
        axes = {
            "prefill_isl": self.prefill_tokens,
            "decode_active_kv_tokens": self.active_tokens,
            "decode_context_length": self.context_tokens,
        }
        for name, axis in axes.items():
            if not axis or any(second <= first for first, second in pairwise(axis)):
                raise _refusal(path, f"has an array {name} that is empty or does not rise")
        if len(self.prefill_ms) != len(self.prefill_tokens):
            raise _refusal(
                path, f"has {len(self.prefill_ms)} prefill_ttft_ms for {len(self.prefill_tokens)} prefill_isl"
            )
        if [len(row) for row in self.decode_ms] != [len(self.context_tokens)] * len(self.active_tokens):
            raise _refusal(
                path,
                f"needs decode_itl with {len(self.active_tokens)} rows of {len(self.context_tokens)}, as its axes are",
            )
        if min(*self.prefill_ms, *(min(row) for row in self.decode_ms)) <= 0:
            raise _refusal(path, "has a time that is not above 0")


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as file:
            return {key: file[key].astype(float).tolist() for key in KEYS if key in file}
    return json.loads(path.read_text(encoding="utf-8"))


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]


def _place(axis: Sequence[float], value: float) -> tuple[int, int, float]:
    """Return the points around a value, and how far it is from the first to the second."""
    high = bisect_right(axis, value)
    if not 0 < high < len(axis):
        end = min(high, len(axis) - 1)
        return end, end, 0.0
    return high - 1, high, (value - axis[high - 1]) / (axis[high] - axis[high - 1])


def _between(first: float, second: float, share: float) -> float:
    return first + (second - first) * share


def _refusal(path: Path, problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"option --timing-profile has the value {str(path)!r}, which {problem}; "
        f"give an .npz or JSON file with {', '.join(KEYS)}"
    )
