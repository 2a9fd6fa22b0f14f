"""Projected load: what the router's own decisions have put on each worker, exact between reports."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dynamo_core.errors import CapacityExhaustedError
from dynamo_core.ids import ReservationId, WorkerId
from dynamo_router._active import ActiveBlocks
from dynamo_router._policy import Candidate


class Prediction(msgspec.Struct, frozen=True):
    """Prompt tokens that a request was expected to find cached, by each index; None from one that was not asked."""

    exact: int | None = None
    approximate: int | None = None


NO_PREDICTION = Prediction()


@dataclass(slots=True)
class Reservation:
    """One booked request.

    Attributes:
        candidate: Its worker.
        hashes: Sequence hashes of its prompt.
        uncached_tokens: Prompt tokens that it adds to prefill until its first token.
        prompt_tokens: Length of its prompt.
        output_blocks: Blocks that its output has filled so far.
        output_tokens: Tokens generated so far.
        touched_s: Monotonic time of its last progress.
        prediction: What it was expected to find cached.
        origin: Replica that made it; empty for this one.
    """

    candidate: Candidate
    hashes: Sequence[int]
    uncached_tokens: int
    prompt_tokens: int
    output_blocks: int
    touched_s: float
    prediction: Prediction
    origin: str = ""
    output_tokens: int = 0


class LoadBook:
    """Reservations of all workers and the load they add up to.

    Args:
        block_size: Tokens a block.
        max_reservations: Most bookings at once.
        idle_s: Seconds without progress after which ``expire`` drops a booking.
        track_output: Whether output blocks count.
    """

    def __init__(self, *, block_size: int, max_reservations: int, idle_s: float, track_output: bool = True) -> None:
        self.blocks = ActiveBlocks()
        self.block_size = block_size
        self._max_reservations = max_reservations
        self._idle_s = idle_s
        self._track_output = track_output
        # Least recently touched first, so expiry looks only at the front.
        self._booked: OrderedDict[ReservationId, Reservation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._booked)

    def __contains__(self, reservation: ReservationId) -> bool:
        return reservation in self._booked

    @property
    def full(self) -> bool:
        """Whether as many requests are booked as may be."""
        return len(self._booked) >= self._max_reservations

    def get(self, reservation: ReservationId) -> Reservation | None:
        """Return a booking, or None."""
        return self._booked.get(reservation)

    def of(self, origin: str) -> list[tuple[ReservationId, Reservation]]:
        """Return the bookings that a replica made, least recently touched first; of this one for an empty name."""
        return [(key, booked) for key, booked in self._booked.items() if booked.origin == origin]

    def require_room(self) -> None:
        """Refuse to book beyond the limit.

        Raises:
            CapacityExhaustedError: if as many requests are booked as may be.
        """
        if self.full:
            raise CapacityExhaustedError(
                f"the router has {len(self._booked)} requests booked, its limit; "
                "raise max_reservations or complete requests",
                reason="capacity.pool_exhausted",
            )

    def book(  # noqa: PLR0913 - keyword-only facts of one request
        self,
        reservation: ReservationId,
        candidate: Candidate,
        hashes: Sequence[int],
        *,
        prompt_tokens: int,
        uncached_tokens: int,
        now_s: float,
        prediction: Prediction = NO_PREDICTION,
        origin: str = "",
    ) -> None:
        """Add a request to a worker's load."""
        candidate.decode_blocks += self.blocks.add(candidate.slot, hashes)
        candidate.prefill_tokens += uncached_tokens
        candidate.prefill.add(reservation, uncached_tokens, now_s)
        candidate.active_requests += 1
        self._booked[reservation] = Reservation(
            candidate, hashes, uncached_tokens, prompt_tokens, 0, now_s, prediction, origin
        )

    def first_token(self, reservation: ReservationId, now_s: float) -> None:
        """End a request's prefill load; unknown reservations are ignored."""
        booked = self._touch(reservation, now_s)
        if booked is not None:
            booked.candidate.prefill.finish(reservation, now_s)
            self._end_prefill(booked)

    def progress(self, reservation: ReservationId, output_tokens: int, now_s: float) -> None:
        """Grow a request's output; unknown reservations are ignored."""
        booked = self._touch(reservation, now_s)
        if booked is None or not self._track_output:
            return
        booked.output_tokens = max(booked.output_tokens, output_tokens)
        size = self.block_size
        filled = (booked.prompt_tokens + output_tokens) // size - booked.prompt_tokens // size
        grown = max(filled - booked.output_blocks, 0)
        booked.output_blocks += grown
        booked.candidate.decode_blocks += grown

    def release(self, reservation: ReservationId, now_s: float) -> Reservation | None:
        """Take a request out of its worker's load; returns the booking, or None if there was none."""
        booked = self._booked.pop(reservation, None)
        if booked is None:
            return None
        candidate = booked.candidate
        candidate.prefill.drop(reservation, now_s)
        self._end_prefill(booked)
        candidate.active_requests -= 1
        candidate.decode_blocks -= self.blocks.remove(candidate.slot, booked.hashes) + booked.output_blocks
        return booked

    def expire(self, now_s: float) -> list[ReservationId]:
        """Drop bookings without progress; returns which."""
        gone: list[ReservationId] = []
        while self._booked:
            reservation, booked = next(iter(self._booked.items()))
            if booked.touched_s + self._idle_s > now_s:
                break
            self.release(reservation, now_s)
            gone.append(reservation)
        return gone

    def drop_worker(self, worker: WorkerId, now_s: float) -> None:
        """Drop a worker's bookings."""
        for reservation in [key for key, booked in self._booked.items() if booked.candidate.worker == worker]:
            self.release(reservation, now_s)

    def _touch(self, reservation: ReservationId, now_s: float) -> Reservation | None:
        booked = self._booked.get(reservation)
        if booked is not None:
            booked.touched_s = now_s
            self._booked.move_to_end(reservation)
        return booked

    def _end_prefill(self, booked: Reservation) -> None:
        booked.candidate.prefill_tokens -= booked.uncached_tokens
        booked.uncached_tokens = 0
