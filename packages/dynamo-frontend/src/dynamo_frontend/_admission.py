"""Who may come in: a bound on requests in work, and thresholds above which a model's workers count as busy."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.errors import CapacityExhaustedError, InvalidRequestError
from dynamo_core.load import WorkerLoad
from dynamo_frontend._catalog import ServedModel

_VERDICT_AGE_S = 0.05
MAX_OWN_THRESHOLDS = 1024


class BusyThresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a worker counts as busy; None turns a threshold off.

    Attributes:
        active_decode_blocks_threshold: Share of its KV blocks in use, above 0 and at most 1.
        active_prefill_tokens_threshold: Prompt tokens that it has yet to compute.
    """

    active_decode_blocks_threshold: float | None = None
    active_prefill_tokens_threshold: int | None = None

    def __post_init__(self) -> None:
        share = self.active_decode_blocks_threshold
        if share is not None and not 0 < share <= 1:
            raise InvalidRequestError(
                f"active_decode_blocks_threshold is {share}; it must be above 0 and at most 1.",
                param="active_decode_blocks_threshold",
            )
        tokens = self.active_prefill_tokens_threshold
        if tokens is not None and tokens < 1:
            raise InvalidRequestError(
                f"active_prefill_tokens_threshold is {tokens}; it must be at least 1.",
                param="active_prefill_tokens_threshold",
            )

    def busy(self, load: WorkerLoad) -> bool:
        """Whether a worker with this load is busy."""
        share, tokens = self.active_decode_blocks_threshold, self.active_prefill_tokens_threshold
        reported = load.reported
        if share is not None and reported is not None and reported.kv_total_blocks:
            used = max(reported.kv_used_blocks, load.projected.decode_blocks)
            if used > share * reported.kv_total_blocks:
                return True
        return tokens is not None and load.projected.prefill_tokens > tokens

    def all_busy(self, loads: Iterable[WorkerLoad]) -> bool:
        """Whether there are workers and each is busy."""
        verdicts = [self.busy(load) for load in loads]
        return bool(verdicts) and all(verdicts)


class _Update(BusyThresholds, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str = ""
    reset: bool = False


class Admission:
    """Admits requests.

    Args:
        max_concurrent: Requests in work at once.
        thresholds: For models without their own.
        clock: Time.
    """

    def __init__(self, max_concurrent: int, thresholds: BusyThresholds, clock: Clock) -> None:
        self._max_concurrent = max_concurrent
        self._default = thresholds
        self._own: dict[str, BusyThresholds] = {}
        self._clock = clock
        self._verdicts: dict[str, tuple[float, bool]] = {}
        self.active = 0

    def check(self, model: ServedModel) -> None:
        """Refuse a request that could only wait.

        Raises:
            CapacityExhaustedError: if too many requests are in work, or all workers of the model are busy.
        """
        if self.active >= self._max_concurrent:
            raise CapacityExhaustedError(
                f"{self.active} requests are in work already; try again soon.",
                reason="capacity.pool_exhausted",
                retry_after_s=1.0,
            )
        if self._is_busy(model):
            raise CapacityExhaustedError(
                f"All workers of '{model.name}' are busy; try again soon.",
                reason="capacity.pool_exhausted",
                retry_after_s=1.0,
            )

    @contextlib.contextmanager
    def entered(self, model: ServedModel) -> Generator[None, None, None]:
        """Count a request for as long as the block runs.

        Raises:
            CapacityExhaustedError: as ``check``.
        """
        self.check(model)
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Count a request in."""
        self.active += 1

    def leave(self) -> None:
        """Count a request out."""
        self.active -= 1

    async def operate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Admin operation ``busy_threshold``: set a model's thresholds (the default's without a model), show all.

        With ``reset`` a model has the default's again.

        Raises:
            InvalidRequestError: naming the field that is wrong.
        """
        if arguments:
            try:
                update = msgspec.convert(arguments, _Update)
            except msgspec.ValidationError as error:
                raise InvalidRequestError(f"busy_threshold: {error}") from None
            self._set(update)
        return {"default": msgspec.to_builtins(self._default), "models": msgspec.to_builtins(self._own)}

    def _set(self, update: _Update) -> None:
        found = BusyThresholds(update.active_decode_blocks_threshold, update.active_prefill_tokens_threshold)
        self._verdicts.clear()
        if not update.model:
            self._default = found
        elif update.reset:
            self._own.pop(update.model, None)
        elif update.model in self._own or len(self._own) < MAX_OWN_THRESHOLDS:
            self._own[update.model] = found
        else:
            raise InvalidRequestError(
                f"busy_threshold: {MAX_OWN_THRESHOLDS} models have thresholds of their own already; "
                'take one back with {"model": NAME, "reset": true}.',
                param="model",
            )

    def _is_busy(self, model: ServedModel) -> bool:
        thresholds = self._own.get(model.name, self._default)
        if thresholds == _OFF:
            return False
        # Loads change by reports and decisions; looking at every worker for every request would not be truer.
        now = self._clock.monotonic()
        known = self._verdicts.get(model.name)
        if known is None or now - known[0] > _VERDICT_AGE_S:
            if known is None and len(self._verdicts) >= MAX_OWN_THRESHOLDS:
                self._verdicts.clear()
            known = self._verdicts[model.name] = (now, thresholds.all_busy(model.router.loads()))
        return known[1]


_OFF = BusyThresholds()
