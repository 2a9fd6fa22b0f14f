"""Step times learned online from forward-pass metrics, with their error.

``wall = a + b * prefill tokens + c * decode requests + d * decode KV tokens``, by least squares over samples that are
kept spread over their range: a grid of buckets, of which the fullest gives up its oldest sample. So a steady load does
not push out what was learned at other loads.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import ConfigurationError
from dynamo_core.load import ForwardPassMetrics

Floats: TypeAlias = npt.NDArray[np.float64]
Features: TypeAlias = tuple[float, float, float]

SIDE = 4
TOLERANCE = 1e-9


class StepRegression:
    """Online regression of step time.

    Args:
        max_samples: Passes kept.
        min_samples: Passes before it answers.
        max_kv_tokens: KV tokens of the engine.
        max_num_seqs: Requests that run at once.

    Raises:
        ConfigurationError: if it would answer before it can.
    """

    def __init__(
        self,
        *,
        max_samples: int = 256,
        min_samples: int = 16,
        max_kv_tokens: float = 16384 * 64,
        max_num_seqs: int = 256,
    ) -> None:
        if min_samples < SIDE or max_samples < min_samples:
            raise ConfigurationError(
                f"step regression keeps {max_samples} and needs {min_samples} samples; "
                f"need at least {SIDE} and keep more"
            )
        self.max_kv_tokens = max_kv_tokens
        self.max_num_seqs = max_num_seqs
        self._max_samples, self._min_samples = max_samples, min_samples
        self._buckets: dict[tuple[int, int], deque[tuple[Features, float]]] = {}
        self._count = 0
        self._scale = [1.0, 1.0]
        self._weights: Floats | None = None
        self._stale = False
        self._error_s = math.inf

    def observe(self, passes: ForwardPassMetrics) -> None:
        """Take one pass; idle heartbeats and nonsense are left out."""
        wall, features = passes.wall_time_s, _features(passes)
        if not (math.isfinite(wall) and wall > 0 and all(map(math.isfinite, features))) or min(features) < 0:
            return
        self._buckets.setdefault(self._bucket(features), deque()).append((features, wall))
        self._count += 1
        if self._count > self._max_samples:
            self._retire()
        self._stale = True

    @property
    def ready(self) -> bool:
        """Whether enough was seen and the fit makes sense: more work never takes less time."""
        self._fit()
        return self._weights is not None

    @property
    def error_s(self) -> float:
        """Root mean square error of the fit on its samples; infinite before there is one."""
        self._fit()
        return self._error_s

    def prefill_s(self, tokens: float) -> float:
        """Return the time to compute that many prompt tokens; 0 before it is ready."""
        return self._step((tokens, 0.0, 0.0)) if tokens > 0 else 0.0

    def decode_s(self, requests: float, context_tokens: float) -> float:
        """Return the time of one decode step; 0 before it is ready."""
        return self._step((0.0, requests, requests * context_tokens))

    def step_s(self, prefill_tokens: float, requests: float, kv_tokens: float) -> float:
        """Return the time of a mixed step; 0 before it is ready."""
        return self._step((prefill_tokens, requests, kv_tokens))

    def _step(self, features: Features) -> float:
        self._fit()
        if self._weights is None:
            return 0.0
        return float(self._weights @ np.asarray((1.0, *features)))

    def _bucket(self, features: Features) -> tuple[int, int]:
        prefill, _, kv_tokens = features
        self._scale = [max(self._scale[0], prefill), max(self._scale[1], kv_tokens)]
        return (
            min(SIDE - 1, int(SIDE * prefill / self._scale[0])),
            min(SIDE - 1, int(SIDE * kv_tokens / self._scale[1])),
        )

    def _retire(self) -> None:
        fullest = max(self._buckets.values(), key=len)
        fullest.popleft()
        self._count -= 1

    def _fit(self) -> None:
        if not self._stale:
            return
        self._stale = False
        self._weights, self._error_s = None, math.inf
        if self._count < self._min_samples:
            return
        samples = [sample for bucket in self._buckets.values() for sample in bucket]
        rows = np.asarray([(1.0, *features) for features, _ in samples])
        walls = np.asarray([wall for _, wall in samples])
        weights = _non_negative(rows, walls)
        if weights is not None:
            self._weights = weights
            self._error_s = float(np.sqrt(np.mean((rows @ weights - walls) ** 2)))


def _non_negative(rows: Floats, walls: Floats) -> Floats | None:
    """Least squares in which a column with a negative weight is dropped; None if nothing is left."""
    columns = [index for index in range(rows.shape[1]) if np.any(rows[:, index] > 0)]
    while columns:
        # Columns differ by orders of magnitude; unscaled, the small ones would vanish in the rank decision.
        scale = rows[:, columns].max(axis=0)
        found = np.linalg.lstsq(rows[:, columns] / scale, walls, rcond=None)[0] / scale
        worst = int(np.argmin(found * scale))
        if found[worst] >= -TOLERANCE:
            weights = np.zeros(rows.shape[1])
            weights[columns] = np.maximum(found, 0.0)
            return weights if weights[1:].any() else None
        del columns[worst]
    return None


def _features(passes: ForwardPassMetrics) -> Features:
    done = passes.scheduled
    return (float(done.sum_prefill_tokens), float(done.num_decode_requests), float(done.sum_decode_kv_tokens))
