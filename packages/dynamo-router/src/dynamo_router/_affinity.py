"""Policies that send what belongs together to one place: hashing with bounded loads, and bound sessions."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import xxhash

from dynamo_core.ids import WorkerId
from dynamo_router._cost import NonNegative
from dynamo_router._policies import SimplePolicy
from dynamo_router._policy import Candidate, PolicyOptions, Query, read_options
from dynamo_router._ttft import TtftPolicy

Count = Annotated[int, msgspec.Meta(ge=1)]


class ChwblOptions(PolicyOptions, frozen=True):
    """Knobs of hashing with bounded loads.

    Attributes:
        slack: How far above the mean number of active requests a worker may be.
        prefix_blocks: Leading blocks that make the key where a request names no session.
    """

    slack: NonNegative = 0.25
    prefix_blocks: Count = 2


class ChwblPolicy(SimplePolicy):
    """Consistent hashing with bounded loads: the first worker in the key's own order that is not too busy.

    Each key orders the workers by the hash of key and worker (rendezvous), so one that comes or goes moves only its
    own keys. A worker is passed over if with this request it had more than ``ceil((1 + slack) x mean)`` requests.
    """

    name = "chwbl"
    term = "place"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._knobs = read_options(ChwblOptions, self.name, options)

    @property
    def options(self) -> ChwblOptions:
        """Its options."""
        return self._knobs

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return each candidate's place in the key's order, those that are too busy after all others."""
        key = self._key(query)
        total = sum(worker.active_requests for worker in candidates)
        bound = math.ceil((1.0 + self._knobs.slack) * (total + 1) / len(candidates))
        order = sorted(candidates, key=lambda worker: _weight(key, worker.worker))
        places = {worker.slot: place for place, worker in enumerate(order)}
        return [
            float(places[worker.slot] + (len(order) if worker.active_requests + 1 > bound else 0))
            for worker in candidates
        ]

    def _key(self, query: Query) -> bytes:
        if query.hints.session_id:
            return query.hints.session_id.encode()
        if not query.blocks:
            return b""
        return query.hashes[min(self._knobs.prefix_blocks, query.blocks) - 1].to_bytes(8, "little")


class SessionAffinityOptions(PolicyOptions, frozen=True):
    """Knobs of session bindings.

    Attributes:
        ttl_s: Seconds without a request after which a session is free again.
        max_sessions: Most bindings kept; the longest unused go first.
    """

    ttl_s: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    max_sessions: Count = 100_000


class SessionAffinityPolicy:
    """The worker that had the session's last request; without one, the least predicted time to first token.

    A binding gives way while its worker is filtered out, and moves to whichever worker then serves the session.
    """

    name = "session-affinity"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = read_options(SessionAffinityOptions, self.name, options)
        self._free = TtftPolicy({})
        self._bound: OrderedDict[str, tuple[WorkerId, float]] = OrderedDict()

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return 0 for the bound worker and 1 for others, or predicted seconds if none is bound."""
        bound = self._worker_of(query, candidates)
        if bound is None:
            return self._free.score(query, candidates)
        return [float(worker.worker != bound) for worker in candidates]

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return what decided."""
        if self._worker_of(query, candidates) is None:
            return self._free.terms(query, candidates)
        return [{"not_bound": cost} for cost in self.score(query, candidates)]

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Take the least, ties broken at random."""
        return self._free.pick(costs, candidates, rng)

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Bind the session."""
        session = query.hints.session_id
        if not session:
            return
        self._bound[session] = (candidate.worker, query.now_s)
        self._bound.move_to_end(session)
        if len(self._bound) > self.options.max_sessions:
            self._bound.popitem(last=False)

    def _worker_of(self, query: Query, candidates: Sequence[Candidate]) -> WorkerId | None:
        bound = self._bound.get(query.hints.session_id)
        if bound is None or bound[1] + self.options.ttl_s < query.now_s:
            return None
        return bound[0] if any(worker.worker == bound[0] for worker in candidates) else None


def _weight(key: bytes, worker: WorkerId) -> int:
    return xxhash.xxh3_64_intdigest(key, worker.instance_id ^ worker.dp_rank << 56)
