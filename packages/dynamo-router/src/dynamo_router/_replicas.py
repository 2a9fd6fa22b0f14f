"""Bookings that router replicas tell each other, so that each projects the load of all.

Every replica publishes what it books and what becomes of it, and a sign of life with each upkeep. One that has not
heard a peer's bookings from the beginning, because it is new or missed a message, asks for all of them and gets them
with the peer's next message. Bookings of a peer that leaves or falls silent end with it: whoever held the requests
is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.ids import ReservationId, WorkerId
from dynamo_core.tokens import XXH3_1337_V1, PackedHashes, pack_hashes, unpack_hashes
from dynamo_core.wire import Codec
from dynamo_router._fleet import Fleet
from dynamo_router._load import LoadBook, Reservation
from dynamo_router._view import CacheView

SILENT_S = 10.0
MAX_REPLICAS = 256
BOOKED, FIRST_TOKEN, PROGRESS, ENDED = "booked", "first_token", "progress", "ended"
_NO_HASHES = PackedHashes(b"")
_log = structlog.get_logger(__name__)


class BookingEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change of a booking; kinds that a release does not know are passed over.

    Attributes:
        kind: ``booked``, ``first_token``, ``progress`` or ``ended``.
        reservation: Which.
        worker: Where it is booked.
        hashes: Sequence hashes of the blocks that it holds there, packed.
        prompt_tokens: Length of its prompt.
        uncached_tokens: Prompt tokens still to compute.
        output_tokens: Tokens generated so far.
    """

    kind: str
    reservation: str
    worker: WorkerId = WorkerId(0)
    hashes: PackedHashes = _NO_HASHES
    prompt_tokens: int = 0
    uncached_tokens: int = 0
    output_tokens: int = 0


class ReplicaMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one replica tells the others.

    Attributes:
        replica: Who says it.
        model: Of which model's router.
        block_size: Tokens a block of the hashes.
        algorithm: Hash algorithm of the blocks' contents.
        events: Changes in order.
        whole: True if the events are all its bookings, not changes.
        asks: Replicas whose bookings it has not heard from the beginning.
        leaving: True if it ends.
    """

    replica: str
    model: str = ""
    block_size: int = 0
    algorithm: str = XXH3_1337_V1
    events: tuple[BookingEvent, ...] = ()
    whole: bool = False
    asks: tuple[str, ...] = ()
    leaving: bool = False


REPLICA_MESSAGE = Codec(ReplicaMessage, "dynamo.router_replica_message.v1")


@dataclass(slots=True)
class _Peer:
    heard_s: float
    whole: bool = False


class Replicas:
    """This replica's side of the exchange.

    Args:
        name: This replica, the prefix of its reservations.
        model: Its model; messages about others are passed over.
        book: Bookings, the peers' among them.
        fleet: The candidates.
        view: Hears what peers send to workers whose index is predicted.
        clock: Time.
    """

    def __init__(self, name: str, model: str, *, book: LoadBook, fleet: Fleet, view: CacheView, clock: Clock) -> None:
        self.missed = 0
        self.send: Callable[[bytes], object] | None = None
        self._name = name
        self._model = model
        self._book = book
        self._fleet = fleet
        self._view = view
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._publishers: dict[int, str] = {}
        self._asked = False
        self._due = False

    def __len__(self) -> int:
        return len(self._peers)

    # -- what happens here -------------------------------------------------------------------------------------------

    def booked(self, reservation: ReservationId) -> None:
        """Tell of a new booking."""
        held = None if self.send is None else self._book.get(reservation)
        if held is not None:
            self._say(_booking(reservation, held))

    def first_token(self, reservation: ReservationId) -> None:
        """Tell that a prompt is computed."""
        if self.send is not None and reservation in self._book:
            self._say(BookingEvent(FIRST_TOKEN, reservation))

    def progress(self, reservation: ReservationId, output_tokens: int, blocks_before: int) -> None:
        """Tell of output, once for each block that it fills."""
        held = None if self.send is None else self._book.get(reservation)
        if held is not None and held.output_blocks > blocks_before:
            self._say(BookingEvent(PROGRESS, reservation, output_tokens=output_tokens))

    def ended(self, reservation: ReservationId) -> None:
        """Tell that a booking ended."""
        if self.send is not None:
            self._say(BookingEvent(ENDED, reservation))

    def beat(self) -> None:
        """Give a sign of life, ask for what is missing, answer who asked, and drop peers that gave none."""
        if self.send is None:
            return
        oldest_s = self._clock.monotonic() - SILENT_S
        for name in [name for name, peer in self._peers.items() if peer.heard_s < oldest_s]:
            _log.warning("router_replica_silent", replica=name, silent_s=SILENT_S)
            self._forget(name)
        asks = tuple(name for name, peer in self._peers.items() if not peer.whole)
        whole, self._asked, self._due = self._asked, False, False
        self._publish(self._mine() if whole else (), whole=whole, asks=asks)

    def answer(self) -> None:
        """Say at once what a peer waits for: its answer, or the question to one that is new or was not heard."""
        if self._due:
            self.beat()

    def leave(self) -> None:
        """Say goodbye; say nothing any more."""
        if self.send is not None:
            self._publish((), leaving=True)
        self.send = None

    def worker_added(self) -> None:
        """Ask anew: bookings on this worker that were heard before it was known are missing."""
        for peer in self._peers.values():
            peer.whole = False

    # -- what others say ---------------------------------------------------------------------------------------------

    def hear(self, publisher: int, message: ReplicaMessage) -> None:
        """Take a peer's message."""
        if message.replica == self._name or message.model != self._model:
            return
        if message.leaving:
            self._forget(message.replica)
            return
        peer = self._peers.get(message.replica)
        if peer is None:
            if len(self._peers) >= MAX_REPLICAS:
                return
            peer = self._peers[message.replica] = _Peer(0.0)
            self._due = True
        peer.heard_s = self._clock.monotonic()
        self._publishers[publisher] = message.replica
        if self._name in message.asks:
            self._asked = self._due = True
        if message.block_size != self._book.block_size or message.algorithm != XXH3_1337_V1:
            # Its blocks cannot be compared with ours, so there is nothing to take or to ask for.
            peer.whole = True
            return
        if message.whole:
            self._replace(message)
            peer.whole = True
        else:
            for event in message.events:
                self._take(message.replica, event)

    def lost(self, publisher: int) -> None:
        """Hear that messages of a publisher were lost; its bookings are asked for."""
        self.missed += 1
        peer = self._peers.get(self._publishers.get(publisher, ""))
        if peer is not None:
            peer.whole = False
            self._due = True

    # -- internals ---------------------------------------------------------------------------------------------------

    def _say(self, event: BookingEvent) -> None:
        self._publish((event,))

    def _publish(
        self,
        events: tuple[BookingEvent, ...],
        *,
        whole: bool = False,
        asks: tuple[str, ...] = (),
        leaving: bool = False,
    ) -> None:
        assert self.send is not None
        message = ReplicaMessage(
            self._name,
            self._model,
            self._book.block_size,
            events=events,
            whole=whole,
            asks=asks,
            leaving=leaving,
        )
        self.send(REPLICA_MESSAGE.encode(message))

    def _mine(self) -> tuple[BookingEvent, ...]:
        return tuple(_booking(reservation, held) for reservation, held in self._book.of(""))

    def _replace(self, message: ReplicaMessage) -> None:
        named = {event.reservation for event in message.events}
        for reservation, _ in list(self._book.of(message.replica)):
            if reservation not in named:
                self._book.release(reservation, self._clock.monotonic())
        for event in message.events:
            self._take(message.replica, event)

    def _take(self, replica: str, event: BookingEvent) -> None:
        reservation, now_s = ReservationId(event.reservation), self._clock.monotonic()
        if event.kind == BOOKED:
            self._enter(replica, reservation, event, now_s)
        elif event.kind == FIRST_TOKEN:
            self._book.first_token(reservation, now_s)
        elif event.kind == PROGRESS:
            self._book.progress(reservation, event.output_tokens, now_s)
        elif event.kind == ENDED:
            self._book.release(reservation, now_s)

    def _enter(self, replica: str, reservation: ReservationId, event: BookingEvent, now_s: float) -> None:
        if reservation in self._book:
            # Known, but what became of it since may have been lost.
            if not event.uncached_tokens:
                self._book.first_token(reservation, now_s)
            self._book.progress(reservation, event.output_tokens, now_s)
            return
        candidate = self._fleet.get(event.worker)
        if candidate is None or self._book.full:
            return
        hashes = unpack_hashes(event.hashes)
        self._book.book(
            reservation,
            candidate,
            hashes,
            prompt_tokens=event.prompt_tokens,
            uncached_tokens=event.uncached_tokens,
            now_s=now_s,
            origin=replica,
        )
        self._book.progress(reservation, event.output_tokens, now_s)
        self._view.note(candidate, hashes, now_s)

    def _forget(self, name: str) -> None:
        self._peers.pop(name, None)
        self._publishers = {key: replica for key, replica in self._publishers.items() if replica != name}
        for reservation, _ in list(self._book.of(name)):
            self._book.release(reservation, self._clock.monotonic())


def _booking(reservation: ReservationId, held: Reservation) -> BookingEvent:
    return BookingEvent(
        BOOKED,
        reservation,
        held.candidate.worker,
        pack_hashes(held.hashes),
        held.prompt_tokens,
        held.uncached_tokens,
        held.output_tokens,
    )
