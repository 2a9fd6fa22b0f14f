"""How long an engine's steps take: the contract of timing models, and the analytic one.

All times are seconds. A timing model describes one engine (one replica), however many GPUs it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from dynamo_core.errors import ConfigurationError


class TimingModel(Protocol):
    """Step times and limits of one engine."""

    @property
    def max_kv_tokens(self) -> float:
        """KV tokens its device memory holds."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Requests it runs at once."""
        ...

    def prefill_s(self, tokens: float) -> float:
        """Return the time to compute that many new prompt tokens of one request alone."""
        ...

    def decode_s(self, requests: float, context_tokens: float) -> float:
        """Return the time of one decode step of that many requests with that mean context."""
        ...


@dataclass(frozen=True)
class AnalyticTiming:
    """A fitted model of a mid-size dense model on one current GPU, scaled by a speed-up.

    Prefill is quadratic in the tokens of a step, decode a parabola in the share of KV blocks in use.

    Attributes:
        speedup: Divides every time.
        max_kv_tokens: KV tokens of the device.
        max_num_seqs: Requests that run at once.
        max_batched_tokens: Prompt tokens of one step; longer prompts take several.
    """

    speedup: float = 1.0
    max_kv_tokens: float = 16384 * 64
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192

    def __post_init__(self) -> None:
        if min(self.speedup, self.max_kv_tokens, self.max_num_seqs, self.max_batched_tokens) <= 0:
            raise ConfigurationError(f"analytic timing needs values above 0, got {self}; raise the one that is not")

    def prefill_s(self, tokens: float) -> float:
        """Return the time of the chunks that the tokens make."""
        if tokens <= 0:
            return 0.0
        whole, rest = divmod(tokens, self.max_batched_tokens)
        return whole * self.chunk_s(self.max_batched_tokens) + (self.chunk_s(rest) if rest else 0.0)

    def chunk_s(self, tokens: float) -> float:
        """Return the time of one step's prompt tokens."""
        return (4.209989e-07 * tokens * tokens + 1.518344e-02 * tokens + 16.50142) / 1000 / self.speedup

    def decode_s(self, requests: float, context_tokens: float) -> float:
        """Return the time of one decode step."""
        return self.decode_at_s(requests * context_tokens / self.max_kv_tokens)

    def decode_at_s(self, usage: float) -> float:
        """Return the time of one decode step at a share of KV blocks in use."""
        # The parabola turns down close to a full cache, which no engine does; from its top on it stays level.
        used = 0.0 if usage < 0.0 else 1.0 if usage > 1.0 else usage
        return (-25.74 * used * used + 54.01 * used + 5.74) / 1000 / self.speedup


def transfer_s(tokens: float, kv_bytes_per_token: float, bandwidth_bytes_s: float) -> float:
    """Return the time to move a prompt's KV cache from a prefill to a decode engine; 0 without a bandwidth."""
    return tokens * kv_bytes_per_token / bandwidth_bytes_s if bandwidth_bytes_s > 0 else 0.0


def finite_or(value: float, fallback: float) -> float:
    """Return the value unless it is not a number or infinite."""
    return value if math.isfinite(value) else fallback
