"""How long a step takes: polynomial fits of a mid-size GPU model, scaled by the speed-up ratios."""

from __future__ import annotations

_PREFILL_MS = (4.209989e-07, 1.518344e-02, 16.50142)
_DECODE_MS = (-25.74, 54.01, 5.74)
_MIN_DECODE_MS = 1.0


def prefill_ms(new_tokens: int) -> float:
    """Milliseconds to prefill that many uncached tokens in one step."""
    square, linear, constant = _PREFILL_MS
    return square * new_tokens * new_tokens + linear * new_tokens + constant


def decode_ms(occupancy: float) -> float:
    """Milliseconds of a decode step when this share of the KV blocks is active."""
    square, linear, constant = _DECODE_MS
    return max(_MIN_DECODE_MS, square * occupancy * occupancy + linear * occupancy + constant)


class StepTiming:
    """Durations of mixed steps.

    Args:
        speedup_ratio: How many times faster than the fits.
        decode_speedup_ratio: Further speed-up of the decoding part.
    """

    def __init__(self, *, speedup_ratio: float = 1.0, decode_speedup_ratio: float = 1.0) -> None:
        self._prefill_scale = 1 / (1000 * speedup_ratio)
        self._decode_scale = 1 / (1000 * speedup_ratio * decode_speedup_ratio)

    def step_s(self, *, prefill_tokens: int, decoding: int, occupancy: float) -> float:
        """Seconds of one step."""
        seconds = prefill_ms(prefill_tokens) * self._prefill_scale if prefill_tokens else 0.0
        return seconds + decode_ms(occupancy) * self._decode_scale if decoding else seconds
