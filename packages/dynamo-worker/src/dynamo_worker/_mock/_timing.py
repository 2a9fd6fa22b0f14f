"""How long a step takes: fits of a mid-size GPU model, or a measured profile, scaled by the speed-up ratios."""

from __future__ import annotations

from dynamo_worker._mock._profile import TimingProfile

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
        profile: Measured times; the fits if omitted.
    """

    def __init__(
        self,
        *,
        speedup_ratio: float = 1.0,
        decode_speedup_ratio: float = 1.0,
        profile: TimingProfile | None = None,
    ) -> None:
        self._profile = profile
        self._prefill_scale = 1 / (1000 * speedup_ratio)
        self._decode_scale = 1 / (1000 * speedup_ratio * decode_speedup_ratio)

    def step_s(
        self,
        *,
        prefill_tokens: int,
        decoding: int,
        occupancy: float,
        active_tokens: float = 0.0,
        context_tokens: float = 0.0,
    ) -> float:
        """Seconds of one step.

        Args:
            prefill_tokens: Prompt tokens it computes.
            decoding: Sequences that decode.
            occupancy: Share of the KV blocks that is active.
            active_tokens: The same in tokens; a profile asks for it.
            context_tokens: Mean length of the sequences that decode; a profile asks for it.
        """
        seconds = 0.0
        if prefill_tokens:
            found = prefill_ms(prefill_tokens) if self._profile is None else self._profile.prefill(prefill_tokens)
            seconds += found * self._prefill_scale
        if decoding:
            profile = self._profile
            found = decode_ms(occupancy) if profile is None else profile.decode(active_tokens, context_tokens)
            seconds += found * self._decode_scale
        return seconds
