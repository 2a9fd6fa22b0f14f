"""Filter -> score -> pick, with a fence around policies: one that fails costs its advice, not the request."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import structlog

from dynamo_core import plugins
from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import DynamoError
from dynamo_core.routing import CandidateScore
from dynamo_router._policies import LeastLoadedPolicy
from dynamo_router._policy import Candidate, Policy, Query

MAX_SLOW_RUNS = 3
REST_S = 10.0
_log = structlog.get_logger(__name__)


class Choice(msgspec.Struct, frozen=True):
    """Outcome of one run of the pipeline.

    Attributes:
        candidate: The choice.
        costs: Cost of each eligible candidate, in order.
        policy: The policy that really chose.
        margin: Cost of the runner-up minus cost of the choice; None with a single candidate.
        reason: Why another policy chose than the configured one; empty if it did not.
    """

    candidate: Candidate
    costs: Sequence[float]
    policy: Policy
    margin: float | None
    reason: str = ""


def load_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """Make a policy by name.

    Raises:
        ConfigurationError: if no such policy is installed or an option is wrong.
    """
    return plugins.load("policies", name)(options)


def policy_hash(policy: Policy) -> str:
    """Return a digest of a policy's name and options, to tell decisions under different settings apart."""
    content = msgspec.json.encode([policy.name, policy.options], order="sorted")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class Pipeline:
    """Runs a policy over eligible candidates and falls back to the least loaded one if the policy fails.

    Args:
        policy: The configured policy.
        rng: Source of tie breaks and draws.
        clock: Time; the machine's if omitted.
        budget_s: Seconds that one run of the policy may take. Python cannot stop it, so a slow answer still counts,
            but after ``MAX_SLOW_RUNS`` in a row the fallback decides alone for ``REST_S`` seconds.
    """

    def __init__(
        self, policy: Policy, rng: random.Random, *, clock: Clock | None = None, budget_s: float = math.inf
    ) -> None:
        self.policy = policy
        self.failures = 0
        self.overruns = 0
        self._rng = rng
        self._clock = clock or SystemClock()
        # The policies of this package are known to be quick: if one is late, the machine is, and no fallback helps.
        own = type(policy).__module__.startswith(f"{__package__}.")
        self.budget_s = math.inf if own else budget_s
        self._slow_runs = 0
        self._rests_until_s = -math.inf
        self._fallback = LeastLoadedPolicy({})

    def choose(self, query: Query, candidates: Sequence[Candidate]) -> Choice:
        """Choose among eligible candidates; there must be at least one.

        Raises:
            DynamoError: one that the policy raised on purpose.
        """
        started_s = self._clock.monotonic()
        if started_s < self._rests_until_s:
            return self._run(self._fallback, query, candidates, "fallback: time budget")
        try:
            return self._run(self.policy, query, candidates, "")
        except DynamoError:
            raise
        except Exception as error:  # noqa: BLE001 - policies are third-party code; the request must not pay for them
            self._note(self.policy, error)
            reason = f"fallback: policy {self.policy.name} failed: {type(error).__name__}: {error}"
            return self._run(self._fallback, query, candidates, reason)
        finally:
            self._keep_time(started_s)

    def explain(
        self,
        query: Query,
        choice: Choice,
        candidates: Sequence[Candidate],
        everyone: Sequence[Candidate],
        rejected: Mapping[int, str],
    ) -> tuple[CandidateScore, ...]:
        """Return every worker's inputs, terms and rejection; eligible ones first."""
        terms = self._terms(query, choice, candidates)
        scored = [
            CandidateScore(worker.worker, cost, worker.raw(), dict(parts))
            for worker, cost, parts in zip(candidates, choice.costs, terms, strict=True)
        ]
        if len(candidates) == len(everyone):
            return tuple(scored)
        kept = {worker.slot for worker in candidates}
        removed = [
            CandidateScore(worker.worker, None, worker.raw(), rejected_by=rejected.get(worker.slot, ""))
            for worker in everyone
            if worker.slot not in kept
        ]
        return (*scored, *removed)

    def confirm(self, query: Query, choice: Choice) -> None:
        """Tell the policy that its choice was booked."""
        try:
            choice.policy.chosen(query, choice.candidate)
        except Exception as error:  # noqa: BLE001 - as in choose
            self._note(choice.policy, error)

    def _terms(self, query: Query, choice: Choice, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        try:
            return choice.policy.terms(query, candidates)
        except Exception as error:  # noqa: BLE001 - as in choose
            self._note(choice.policy, error)
            return [{"unexplained": cost} for cost in choice.costs]

    def _keep_time(self, started_s: float) -> None:
        now_s = self._clock.monotonic()
        if now_s - started_s <= self.budget_s:
            self._slow_runs = 0
            return
        self.overruns += 1
        self._slow_runs += 1
        if self._slow_runs >= MAX_SLOW_RUNS:
            self._slow_runs = 0
            self._rests_until_s = now_s + REST_S
            _log.warning("policy_rests", policy=self.policy.name, took_s=now_s - started_s, budget_s=self.budget_s)

    def _note(self, policy: Policy, error: Exception) -> None:
        self.failures += 1
        _log.warning("policy_failed", policy=policy.name, error=repr(error), failures=self.failures)

    def _run(self, policy: Policy, query: Query, candidates: Sequence[Candidate], reason: str) -> Choice:
        costs = policy.score(query, candidates)
        # A finite sum has finite parts; one that is not may also have overflowed.
        if len(costs) != len(candidates) or not (math.isfinite(sum(costs)) or all(map(math.isfinite, costs))):
            raise ValueError(f"it gave {len(costs)} costs for {len(candidates)} candidates, or one is not finite")
        index = policy.pick(costs, candidates, self._rng)
        if not 0 <= index < len(candidates):
            raise ValueError(f"it picked candidate {index} of {len(candidates)}")
        cost = costs[index]
        others = list(costs)
        del others[index]
        return Choice(candidates[index], costs, policy, min(others) - cost if others else None, reason)
