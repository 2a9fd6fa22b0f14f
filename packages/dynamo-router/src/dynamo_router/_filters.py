"""Eligibility: which workers a request may go to, and why the others not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from dynamo_core.errors import CapacityExhaustedError, InvalidRequestError, UnavailableError
from dynamo_core.routing import RoutingPhase, RoutingRequest
from dynamo_router._policy import Candidate
from dynamo_router._settings import RouterSettings


class BusyLimits(msgspec.Struct, frozen=True):
    """Load beyond which a worker takes no new request; None leaves a limit out.

    Attributes:
        kv_usage: Share of the device blocks in use, as the worker reports it.
        prefill_tokens: Booked prefill tokens.
        prefill_batches: Booked prefill tokens in units of the worker's largest step.
    """

    kv_usage: float | None = None
    prefill_tokens: int | None = None
    prefill_batches: float | None = None

    def exceeded(self, worker: Candidate) -> str:
        """Return which limit a worker exceeds, in words; empty if none."""
        report = worker.reported
        if self.kv_usage is not None and report is not None and report.kv_total_blocks:
            usage = report.kv_used_blocks / report.kv_total_blocks
            if usage > self.kv_usage:
                return f"busy: {usage:.2f} of its KV blocks in use, limit {self.kv_usage}"
        if self.prefill_tokens is not None and worker.prefill_tokens > self.prefill_tokens:
            return f"busy: {worker.prefill_tokens} prefill tokens, limit {self.prefill_tokens}"
        if self.prefill_batches is not None and worker.max_num_batched_tokens:
            batches = worker.prefill_tokens / worker.max_num_batched_tokens
            if batches > self.prefill_batches:
                return f"busy: {batches:.1f} steps of prefill, limit {self.prefill_batches}"
        return ""


NO_LIMITS = BusyLimits()


def limits_of(settings: RouterSettings) -> BusyLimits:
    """Return when a worker counts as busy."""
    return BusyLimits(settings.busy_kv_usage, settings.busy_prefill_tokens, settings.busy_prefill_batches)


def pin_of(request: RoutingRequest) -> tuple[int | None, int | None]:
    """Return the (instance, dp rank) that a request names for this hop."""
    hints = request.hints
    if request.phase is RoutingPhase.PREFILL:
        return hints.prefill_instance_id, hints.prefill_dp_rank
    return hints.instance_id, hints.dp_rank


def eligible(
    request: RoutingRequest,
    candidates: Sequence[Candidate],
    limits: BusyLimits,
    now_s: float,
) -> tuple[Sequence[Candidate], Mapping[int, str]]:
    """Return the workers that may serve a request, and the reason per slot for those that may not.

    Raises:
        UnavailableError: if there is no worker, or all are excluded.
        InvalidRequestError: if the pinned worker or dp rank does not exist.
        CapacityExhaustedError: if only busy workers remain.
    """
    if not candidates:
        raise UnavailableError("no worker serves this model at this moment; start one, or retry when it is ready")
    _require_pin(request, candidates)
    reasons: dict[int, str] = {}
    allowed = _keep(candidates, reasons, lambda worker: _hint_reason(request, worker))
    if not allowed:
        raise UnavailableError(_no_worker("every worker is ruled out by the request", candidates, reasons))
    if limits != NO_LIMITS:
        allowed = _keep(allowed, reasons, limits.exceeded)
        if not allowed:
            raise CapacityExhaustedError(
                _no_worker("all eligible workers are busy", candidates, reasons), reason="capacity.pool_exhausted"
            )
    usable = _keep(allowed, reasons, lambda worker: inhibition(worker, now_s))
    if usable or pin_of(request)[0] is None:
        # An inhibition is a suspicion: with nobody else left, a suspect is better than no answer.
        return usable or allowed, reasons
    raise UnavailableError(
        _no_worker("the pinned worker could not be reached a moment ago", candidates, reasons),
        retry_after_s=max(0.0, min(worker.inhibited_until_s for worker in allowed) - now_s),
    )


def inhibition(worker: Candidate, now_s: float) -> str:
    """Return why a worker is left out for a while; empty if it is not."""
    return f"inhibited: {worker.inhibited_reason}" if worker.inhibited_until_s > now_s else ""


def is_plain(request: RoutingRequest) -> bool:
    """Whether a request rules no worker out."""
    hints = request.hints
    return not (
        request.excluded
        or hints.allowed_instance_ids
        or hints.excluded_instance_ids
        or hints.required_taints
        or pin_of(request) != (None, None)
    )


def _keep(
    candidates: Sequence[Candidate], reasons: dict[int, str], reason_of: Callable[[Candidate], str]
) -> Sequence[Candidate]:
    kept: list[Candidate] = []
    for worker in candidates:
        if reason := reason_of(worker):
            reasons[worker.slot] = reason
        else:
            kept.append(worker)
    return kept


def _hint_reason(request: RoutingRequest, worker: Candidate) -> str:
    hints = request.hints
    instance, rank = worker.worker.instance_id, worker.worker.dp_rank
    pinned, pinned_rank = pin_of(request)
    missing = set(hints.required_taints) - worker.taints
    checks = (
        (worker.worker in request.excluded or instance in hints.excluded_instance_ids, "excluded by the request"),
        (bool(hints.allowed_instance_ids) and instance not in hints.allowed_instance_ids, "not in the allow-list"),
        (pinned is not None and instance != pinned, "another instance is pinned"),
        (pinned_rank is not None and rank != pinned_rank, "another dp rank is pinned"),
        (bool(missing), f"lacks taints {', '.join(sorted(missing))}"),
    )
    return next((reason for applies, reason in checks if applies), "")


def _require_pin(request: RoutingRequest, candidates: Sequence[Candidate]) -> None:
    instance, rank = pin_of(request)
    ranks = [worker.worker.dp_rank for worker in candidates if instance in (None, worker.worker.instance_id)]
    if not ranks:
        raise InvalidRequestError(
            f"pinned instance {instance:x} does not serve this model; name a live one or leave the pin out",
            reason="request.unknown_worker",
            param="routing.instance_id",
        )
    if rank is not None and rank not in ranks:
        raise InvalidRequestError(
            f"pinned dp rank {rank} is outside {min(ranks)}..{max(ranks)}; name a rank that exists",
            reason="request.unknown_worker",
            param="routing.dp_rank",
        )


def _no_worker(what: str, candidates: Sequence[Candidate], reasons: Mapping[int, str]) -> str:
    shown = [f"{worker.worker}: {reasons[worker.slot]}" for worker in candidates if worker.slot in reasons]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"{what} ({'; '.join(shown[:4])}{more}); retry later or loosen the request"
