"""How true the index is: predicted cached tokens against what engines report, per worker.

A worker's exact index is believed while its event stream is whole and its predictions hold. Otherwise the index of own
decisions stands in for it, and if that is wrong too, only load counts. Both predictions go on being scored while they
are not used, so belief returns by itself.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable

WINDOW = 32
MIN_SAMPLES = 16
DISTRUST_BELOW = 0.4
TRUST_FROM = 0.6


class IndexMode(enum.Enum):
    """What a worker's cached tokens are predicted from."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    LOAD_ONLY = "load-only"


class TruthScore:
    """Agreement of predictions with reports over the last ``WINDOW`` requests that one of them said had hits.

    The score is the tokens both agree on over the tokens that either names, 1 at best. Belief ends below
    ``DISTRUST_BELOW`` and returns at ``TRUST_FROM``.
    """

    def __init__(self) -> None:
        self.trusted = True
        self._samples: deque[tuple[int, int]] = deque(maxlen=WINDOW)

    @property
    def score(self) -> float | None:
        """Agreement; None with fewer than ``MIN_SAMPLES`` samples."""
        if len(self._samples) < MIN_SAMPLES:
            return None
        either = sum(union for _, union in self._samples)
        return sum(both for both, _ in self._samples) / either

    def add(self, predicted: int, reported: int) -> None:
        """Take one request's prediction and report, in tokens."""
        if max(predicted, reported) <= 0:
            return
        self._samples.append((min(predicted, reported), max(predicted, reported)))
        score = self.score
        if score is not None:
            self.trusted = score >= (DISTRUST_BELOW if self.trusted else TRUST_FROM)

    def reset(self) -> None:
        """Begin anew, in trust."""
        self.trusted = True
        self._samples.clear()


class Truth:
    """Scores of all slots, and the slots that each index is not believed for as bit sets."""

    def __init__(self) -> None:
        self.exact_distrusted = 0
        self.approximate_distrusted = 0
        self._exact: dict[int, TruthScore] = {}
        self._approximate: dict[int, TruthScore] = {}

    def exact_score(self, slot: int) -> float | None:
        """Return the score of a slot's exact index, if there is one yet."""
        found = self._exact.get(slot)
        return None if found is None else found.score

    def observe(self, slot: int, *, exact: int | None, approximate: int | None, reported: int) -> bool:
        """Score the predictions made for a finished request; returns whether the exact index just lost belief."""
        bit = 1 << slot
        before = self.exact_distrusted & bit
        if exact is not None:
            self.exact_distrusted = _observe(self._exact, slot, exact, reported, self.exact_distrusted)
        if approximate is not None:
            self.approximate_distrusted = _observe(
                self._approximate, slot, approximate, reported, self.approximate_distrusted
            )
        return not before and bool(self.exact_distrusted & bit)

    def reset_exact(self, slot: int) -> None:
        """Believe a slot's exact index again, because it was rebuilt."""
        self._exact.pop(slot, None)
        self.exact_distrusted &= ~(1 << slot)

    def forget(self, slot: int) -> None:
        """Drop a slot's scores."""
        self.reset_exact(slot)
        self._approximate.pop(slot, None)
        self.approximate_distrusted &= ~(1 << slot)

    def mode(self, slot: int, *, live: bool) -> IndexMode:
        """Return what a slot's prediction is made from; ``live`` tells whether its event stream is whole."""
        if live and not self.exact_distrusted >> slot & 1:
            return IndexMode.EXACT
        return IndexMode.LOAD_ONLY if self.approximate_distrusted >> slot & 1 else IndexMode.APPROXIMATE

    def scores(self) -> Iterable[float]:
        """Return the scores of all exact indexes that have one."""
        return [score.score for score in self._exact.values() if score.score is not None]


def _observe(scores: dict[int, TruthScore], slot: int, predicted: int, reported: int, distrusted: int) -> int:
    score = scores.setdefault(slot, TruthScore())
    score.add(predicted, reported)
    return distrusted & ~(1 << slot) if score.trusted else distrusted | 1 << slot
