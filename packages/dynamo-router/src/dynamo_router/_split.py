"""Prefill and decode on workers of their own, or on one when that is better.

A split request is computed by a prefill worker, handed over, and decoded elsewhere. Where little is left to compute on
the decode worker, or the prefill workers are busy, the hand-over costs more than it saves; then the decode worker does
both. A decode worker that is itself busy, or does not say how busy it is, is spared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError
from dynamo_core.load import WorkerLoad
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RequestOutcome, RoutingDecision, RoutingPhase, RoutingRequest
from dynamo_core.tokens import token_count
from dynamo_router._router import KvRouter


class SplitOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a decode worker computes the prompt itself.

    Attributes:
        policy: ``always`` splits every request; ``isl_bounding`` keeps short rests, ``prefill_load`` keeps requests
            while prefill workers are busy, ``isl_or_load`` does either.
        eff_isl_threshold: Uncached prompt tokens on the decode worker below which a rest is short, if
        eff_isl_ratio_threshold: its share of the prompt is also below this.
        prefill_busy_tokens: Booked prefill tokens beyond which the chosen prefill worker is busy.
        decode_busy_kv_usage: Share of used KV blocks beyond which the decode worker is spared.
    """

    policy: Literal["always", "isl_bounding", "prefill_load", "isl_or_load"] = "always"
    eff_isl_threshold: Annotated[int, msgspec.Meta(ge=0)] = 2048
    eff_isl_ratio_threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.7
    prefill_busy_tokens: Annotated[int, msgspec.Meta(ge=0)] = 16_384
    decode_busy_kv_usage: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.9


class SplitDecision(msgspec.Struct, frozen=True):
    """Where a request is computed and where it is decoded.

    Attributes:
        decode: The worker that decodes; without ``prefill`` it computes the prompt too.
        prefill: The worker that computes the prompt, if that is another one.
        reason: Why, in words.
    """

    decode: RoutingDecision
    prefill: RoutingDecision | None
    reason: str


def read_split_options(options: Mapping[str, Any]) -> SplitOptions:
    """Read options by name.

    Raises:
        ConfigurationError: for an unknown option or a value out of range.
    """
    try:
        return msgspec.convert(dict(options), SplitOptions, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(SplitOptions.__struct_fields__)
        raise ConfigurationError(f"split: {error}; it takes: {known}") from error


async def select_split(
    prefill: KvRouter, decode: KvRouter, request: RoutingRequest, options: SplitOptions
) -> SplitDecision:
    """Choose one worker or two, and book them if asked.

    Args:
        prefill: Routes to the prefill workers.
        decode: Routes to the decode workers.
        request: What is asked; its phase is not looked at.
        options: When to split.

    Raises:
        DynamoError: as ``KvRouter.select`` does; nothing stays booked then. Cancelling leaves nothing booked either.
    """
    alone = await _ask(decode, request, RoutingPhase.AGGREGATED)
    before = await _ask(prefill, request, RoutingPhase.PREFILL)
    local, reason = _judge(request, alone, before, prefill, decode, options)
    if local:
        return SplitDecision(await _book(decode, request, RoutingPhase.AGGREGATED, alone), None, reason)
    first = await _book(prefill, request, RoutingPhase.PREFILL, before)
    try:
        second = await decode.select(msgspec.structs.replace(request, phase=RoutingPhase.DECODE))
    except BaseException:
        # Also a cancellation must not leave the other half booked.
        if first.reservation is not None:
            outcome = RequestOutcome(first.decision_id, FinishReason.ERROR)
            prefill.complete(first.reservation, outcome)
        raise
    return SplitDecision(second, first, reason)


async def _ask(router: KvRouter, request: RoutingRequest, phase: RoutingPhase) -> RoutingDecision:
    return await router.select(msgspec.structs.replace(request, phase=phase, reserve=False))


async def _book(
    router: KvRouter, request: RoutingRequest, phase: RoutingPhase, asked: RoutingDecision
) -> RoutingDecision:
    """Book the worker that was judged, if booking is asked for at all."""
    if not request.reserve:
        return asked
    pin: dict[str, Any] = {"instance_id": asked.worker.instance_id, "dp_rank": asked.worker.dp_rank}
    if phase is RoutingPhase.PREFILL:
        pin = {f"prefill_{name}": value for name, value in pin.items()}
    hints: RoutingHints = msgspec.structs.replace(request.hints, **pin)
    return await router.select(msgspec.structs.replace(request, phase=phase, hints=hints))


def _judge(
    request: RoutingRequest,
    alone: RoutingDecision,
    before: RoutingDecision,
    prefill: KvRouter,
    decode: KvRouter,
    options: SplitOptions,
) -> tuple[bool, str]:
    if options.policy == "always":
        return False, "every request is split"
    usage = _kv_usage(_load_of(decode, alone))
    if usage is None:
        return False, "split: the decode worker does not report its KV usage"
    if usage > options.decode_busy_kv_usage:
        return False, f"split: the decode worker uses {usage:.2f} of its KV blocks"
    tokens = max(request.prompt_tokens, token_count(request.token_ids), 1)
    rest = max(tokens - alone.cached_tokens, 0)
    booked = _load_of(prefill, before).projected.prefill_tokens
    short = rest < options.eff_isl_threshold and rest / tokens < options.eff_isl_ratio_threshold
    if short and options.policy in ("isl_bounding", "isl_or_load"):
        return True, f"one worker: {rest} of {tokens} prompt tokens are left to compute there"
    if booked > options.prefill_busy_tokens and options.policy in ("prefill_load", "isl_or_load"):
        return True, f"one worker: the prefill worker has {booked} tokens to compute"
    return False, f"split: {rest} of {tokens} prompt tokens are to compute"


def _load_of(router: KvRouter, decision: RoutingDecision) -> WorkerLoad:
    return next(load for load in router.loads() if load.worker == decision.worker)


def _kv_usage(load: WorkerLoad) -> float | None:
    reported = load.reported
    if reported is None or not reported.kv_total_blocks:
        return None
    return reported.kv_used_blocks / reported.kv_total_blocks
