"""Keep a promise of time to first token, and use no more of the fleet for it than needed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from dynamo_router._policy import Candidate, PolicyOptions, Query, least, read_options
from dynamo_router._ttft import TtftPolicy


class SloOptions(PolicyOptions, frozen=True):
    """The promise.

    Attributes:
        ttft_s: Seconds to the first token that are good enough.
        among_good: Of workers that keep the promise take the one with the least (``pack``) or the most (``spread``)
            time to spare.
        decode_weight: As in policy ``ttft``.
        overlap_weight: As in policy ``ttft``.
    """

    ttft_s: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    among_good: Literal["pack", "spread"] = "spread"
    decode_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    overlap_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.3


class SloPolicy:
    """Workers whose predicted time to first token keeps the promise come first; the others by how much they miss."""

    name = "slo"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = read_options(SloOptions, self.name, options)
        self._predictor = TtftPolicy(
            {"decode_weight": self.options.decode_weight, "overlap_weight": self.options.overlap_weight}
        )

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return time to spare (``pack``) or used (``spread``), and beyond the promise what it is missed by."""
        return [sum(self._parts(predicted).values()) for predicted in self._predictor.score(query, candidates)]

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return the same by name."""
        return [self._parts(predicted) for predicted in self._predictor.score(query, candidates)]

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Take the least, ties broken at random."""
        return least(costs, rng)

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Keep no state."""

    def _parts(self, predicted_s: float) -> dict[str, float]:
        limit = self.options.ttft_s
        if predicted_s > limit:
            return {"promise": limit, "missed_by": predicted_s - limit}
        if self.options.among_good == "pack":
            return {"to_spare": limit - predicted_s}
        return {"used": predicted_s}
