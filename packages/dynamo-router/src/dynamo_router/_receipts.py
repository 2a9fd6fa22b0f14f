"""Receipts: the last decisions with what became of them."""

from __future__ import annotations

from collections import OrderedDict

from dynamo_core.routing import RequestOutcome, RoutingDecision
from dynamo_router._settings import RouterSettings


class ReceiptRing:
    """A bounded store of decisions and their outcomes; the oldest go first.

    Args:
        capacity: Most decisions kept; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[str, tuple[RoutingDecision, RequestOutcome | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, decision: RoutingDecision) -> None:
        """Keep a decision."""
        if self.capacity:
            self._kept[decision.decision_id] = (decision, None)
            if len(self._kept) > self.capacity:
                self._kept.popitem(last=False)

    def join(self, decision_id: str, outcome: RequestOutcome) -> RoutingDecision | None:
        """Add what became of a decision; returns it if it is still kept and this is its first outcome."""
        kept = self._kept.get(decision_id)
        if kept is None or kept[1] is not None:
            return None
        self._kept[decision_id] = (kept[0], outcome)
        return kept[0]

    def get(self, decision_id: str) -> tuple[RoutingDecision, RequestOutcome | None] | None:
        """Return a decision and its outcome, if still kept."""
        return self._kept.get(decision_id)

    def recent(self, limit: int) -> list[tuple[RoutingDecision, RequestOutcome | None]]:
        """Return the newest decisions, newest first."""
        return [entry for entry, _ in zip(reversed(self._kept.values()), range(limit), strict=False)]


def regret_tokens(decision: RoutingDecision, outcome: RequestOutcome | None) -> int:
    """Return the prefill tokens that the eligible worker with most of the prompt would have saved.

    What the choice really had cached counts if the engine said so. Load is left out: a policy may have had good reason.
    0 for a decision whose candidates were not recorded.
    """
    most = max(
        (score.raw.get("cached_tokens", 0) for score in decision.candidates if score.cost is not None), default=0
    )
    reported = None if outcome is None else outcome.cached_tokens
    return max(0, int(most) - (decision.cached_tokens if reported is None else reported))


def recorded_share(settings: RouterSettings) -> float:
    """Return the share of decisions whose receipt names every candidate."""
    return {"off": 0.0, "sampled": settings.receipts_sample_share, "on": 1.0}[settings.receipts]
