"""What a routing policy sees and must do.

A decision is filter -> score -> pick. The router filters; a policy gives every remaining candidate a cost (lower is
better) and may bring its own way to pick. A policy is found by name under the entry-point group
``dynamo_core.policies``, whose entries are factories that take the policy's options.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ReportedLoad
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RoutingPhase

Options = TypeVar("Options", bound="PolicyOptions")


class PolicyOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of a policy's options; unknown names are refused."""


class Query(msgspec.Struct, frozen=True):
    """The request as policies see it. No prompt text.

    Attributes:
        prompt_tokens: Length of the prompt.
        blocks: Full blocks of the prompt.
        block_size: Tokens a block.
        hints: What the client asked for.
        phase: Which hop.
        hashes: Sequence hashes of those blocks.
        now_s: Monotonic time of the decision.
    """

    prompt_tokens: int
    blocks: int
    block_size: int
    hints: RoutingHints
    phase: RoutingPhase
    hashes: Sequence[int]
    now_s: float


class PrefillQueue:
    """Booked prefills of one worker in order, and how fast it has worked through them.

    Attributes:
        waiting: Uncached tokens by reservation, oldest first; removed at the first token.
        since_s: Monotonic time at which the oldest one began.
        done_tokens: Recent tokens computed while any waited, older ones fading.
        done_s: Seconds they took.
    """

    __slots__ = ("done_s", "done_tokens", "since_s", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        self.since_s = 0.0
        self.done_tokens = 0.0
        self.done_s = 0.0

    def add(self, reservation: str, tokens: int, now_s: float) -> None:
        """Queue a prefill."""
        if not self.waiting:
            self.since_s = now_s
        self.waiting[reservation] = tokens

    def finish(self, reservation: str, now_s: float) -> None:
        """Take a prefill out because its first token came, and learn from the time that it took."""
        tokens = self.waiting.pop(reservation, None)
        if tokens is None:
            return
        if self.done_s > PACE_WINDOW_S:
            self.done_tokens *= PACE_WINDOW_S / self.done_s
            self.done_s = PACE_WINDOW_S
        self.done_tokens += tokens
        self.done_s += max(now_s - self.since_s, 0.0)
        self.since_s = now_s

    def drop(self, reservation: str, now_s: float) -> None:
        """Take a prefill out that will never finish."""
        oldest = next(iter(self.waiting), None)
        if self.waiting.pop(reservation, None) is not None and reservation == oldest:
            self.since_s = now_s


class Candidate:
    """One worker: its facts, its load at this moment, and what it holds of this prompt.

    The same object serves every decision; read it during ``score`` and ``pick`` and keep no reference.

    Attributes:
        worker: Which.
        slot: Its place in bit sets.
        total_kv_blocks: Device blocks of the rank; 0 if unknown.
        max_num_batched_tokens: Most tokens in one engine step; 0 if unknown.
        taints: Scheduling labels.
        prefill_tokens: Uncached prompt tokens booked and not yet computed.
        prefill: Order and pace of that work; see ``PrefillQueue``.
        decode_blocks: Distinct blocks of booked requests, their output included.
        active_requests: Requests booked and not complete.
        reported: The worker's own last report.
        tier_blocks: Blocks of this prompt that it holds, by tier, nearest first, each beyond the nearer ones.
        active_blocks: Leading blocks of this prompt that its running requests already use.
        cached_tokens: Prompt tokens that it need not compute.
    """

    __slots__ = (
        "active_blocks",
        "active_requests",
        "cached_tokens",
        "decode_blocks",
        "inhibited_reason",
        "inhibited_until_s",
        "max_num_batched_tokens",
        "prefill",
        "prefill_tokens",
        "reported",
        "slot",
        "taints",
        "tier_blocks",
        "total_kv_blocks",
        "worker",
    )

    def __init__(self, worker: WorkerId, slot: int) -> None:
        self.worker = worker
        self.slot = slot
        self.total_kv_blocks = 0
        self.max_num_batched_tokens = 0
        self.taints: frozenset[str] = frozenset()
        self.prefill_tokens = 0
        self.prefill = PrefillQueue()
        self.decode_blocks = 0
        self.active_requests = 0
        self.reported: ReportedLoad | None = None
        self.inhibited_until_s = 0.0
        self.inhibited_reason = ""
        self.tier_blocks: tuple[int, ...] = NO_BLOCKS
        self.active_blocks = 0
        self.cached_tokens = 0

    def raw(self) -> dict[str, float]:
        """Return every input by name, for receipts."""
        device, host, disk, external = self.tier_blocks
        return {
            "device_blocks": device,
            "host_blocks": host,
            "disk_blocks": disk,
            "external_blocks": external,
            "cached_tokens": self.cached_tokens,
            "active_blocks": self.active_blocks,
            "prefill_tokens": self.prefill_tokens,
            "decode_blocks": self.decode_blocks,
            "active_requests": self.active_requests,
        }


NO_BLOCKS: tuple[int, ...] = (0, 0, 0, 0)
PACE_WINDOW_S = 60.0
"""Seconds of prefill work that a pace is averaged over."""


RENAMED: Mapping[str, str] = {
    "overlap_score_credit": "overlap_credit",
    "overlap_score_credit_decay": "credit_decay",
    "overlap_score_weight": "prefill_scale",
    "prefill_load_scale": "prefill_scale",
    "host_cache_hit_weight": "host_weight",
    "disk_cache_hit_weight": "disk_weight",
    "shared_cache_multiplier": "external_weight",
    "router_temperature": "temperature",
    "decode_active_request_weight": "active_request_weight",
    "track_prefill_tokens": "track_prefill",
    "ttl_secs": "approximate_ttl_s",
    "queue_threshold": "busy_prefill_batches",
    "queue_policy": "queue_classes",
    "active_request_expiry_secs": "reservation_idle_s",
    "max_tree_size": "max_index_blocks",
}
"""Options that NVIDIA's router has under another name, so that who brings them is told ours."""


@runtime_checkable
class Policy(Protocol):
    """Scores candidates. Called on the event loop; must not block."""

    @property
    def name(self) -> str:
        """Name for receipts."""
        ...

    @property
    def options(self) -> PolicyOptions:
        """Its options; their digest goes into receipts."""
        ...

    @property
    def needs_index(self) -> bool:
        """Whether it reads ``tier_blocks``; if not, the index is not asked."""
        ...

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return a finite cost for each candidate, in order; lower is better."""
        ...

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return the parts of each candidate's cost by name; they sum to it. Only called for receipts."""
        ...

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Return the index of the choice."""
        ...

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Hear that a request was really sent there, to keep state such as a cursor."""
        ...


class PolicyFactory(Protocol):
    """Entry of ``dynamo_core.policies``."""

    def __call__(self, options: Mapping[str, Any]) -> Policy:
        """Return the policy.

        Raises:
            ConfigurationError: for an unknown option or a value out of range.
        """
        ...


def read_options(kind: type[Options], policy: str, options: Mapping[str, Any]) -> Options:
    """Turn options by name into their type.

    Raises:
        ConfigurationError: naming the option, with those that exist.
    """
    try:
        return msgspec.convert(dict(options), type=kind, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__) or "none"
        renamed = "".join(f"; {name} is called {RENAMED[name]} here" for name in options if name in RENAMED)
        raise ConfigurationError(f"options of policy {policy!r}: {error}; it takes: {known}{renamed}") from error


def least(costs: Sequence[float], rng: random.Random) -> int:
    """Return the index of the least cost, ties broken uniformly at random."""
    best = min(costs)
    if costs.count(best) == 1:
        return costs.index(best)
    return rng.choice([index for index, cost in enumerate(costs) if cost == best])
