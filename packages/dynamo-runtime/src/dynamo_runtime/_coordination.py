"""Leader election and barriers on any discovery backend, by compare-and-set under a lease."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.discovery import (
    DEFAULT_LEASE_TTL_S,
    Discovery,
    Lease,
    RecordDeleted,
    RecordPut,
    WatchEvent,
    WatchSynced,
    quote_segment,
)
from dynamo_core.errors import ConflictError, DynamoError, UnavailableError
from dynamo_runtime._plane.timers import wait_within

ELECTIONS_PREFIX = "v1/elections/"
BARRIERS_PREFIX = "v1/barriers/"
_RETRY_S = 0.2
_ASK_S = 1.0


class LeaderElection:
    """At most one process leads at a time.

    Leadership ends when the process resigns or dies, when the store loses the record, or, as its holder sees it, when
    discovery has been out of reach for half the time to live: by the time another process can be elected, the former
    leader knows. Whoever writes elsewhere as a leader sends ``term`` along, and the receiver refuses a smaller one.

    Args:
        discovery: Started discovery plane.
        name: What is led.
        candidate: Value of the record, for others to read: an address or a name.
        ttl_s: Time after which a leader that died is replaced.
        clock: Time.
    """

    def __init__(
        self,
        discovery: Discovery,
        name: str,
        *,
        candidate: bytes = b"",
        ttl_s: float = DEFAULT_LEASE_TTL_S,
        clock: Clock | None = None,
    ) -> None:
        self._discovery = discovery
        self._key = ELECTIONS_PREFIX + quote_segment(name)
        self._candidate = candidate
        self._ttl_s = ttl_s
        self._clock = clock or SystemClock()
        self._lease: Lease | None = None
        self._term: int | None = None
        self._guard: asyncio.Task[None] | None = None

    @property
    def leading(self) -> bool:
        """Whether this process leads now. Does no I/O."""
        lease = self._lease
        if self._term is None or lease is None or not lease.valid:
            return False
        return self._discovery.status().stale_for_s < self._ttl_s / 2

    @property
    def term(self) -> int | None:
        """Number of the leadership, larger than that of every earlier one in this store; None if not elected."""
        return self._term

    async def leader(self) -> bytes | None:
        """Return the present leader's value, or None."""
        record = await self._discovery.get(self._key)
        return record.value if record is not None else None

    async def campaign(self) -> None:
        """Return once this process leads. Cancelling leaves the race.

        Discovery out of reach only delays it.
        """
        await self.resign()
        try:
            while self._term is None:
                try:
                    await self._run_for_it()
                except (UnavailableError, ConflictError):
                    await self._clock.sleep(_RETRY_S)
        except BaseException:
            await self.resign()
            raise
        self._guard = asyncio.get_running_loop().create_task(self._watch_over(self._term), name=f"leads {self._key}")

    async def wait_lost(self) -> None:
        """Return once this process does not lead, at once if it never did. Cancelling only ends the wait."""
        while self.leading:
            await self._clock.sleep(min(_RETRY_S, self._ttl_s / 8))

    async def resign(self) -> None:
        """Give up leading. Idempotent."""
        self._term = None
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.cancel()
            await asyncio.gather(guard, return_exceptions=True)
        lease, self._lease = self._lease, None
        if lease is not None:
            # Without discovery the record goes when the lease does.
            with contextlib.suppress(DynamoError):
                await lease.revoke()

    async def _run_for_it(self) -> None:
        changed = asyncio.Event()
        watching = asyncio.get_running_loop().create_task(self._tell_removals(changed))
        try:
            while self._term is None:
                if self._lease is None or not self._lease.valid:
                    self._lease = await self._discovery.lease(self._ttl_s)
                self._term = await self._discovery.compare_and_set(
                    self._key, self._candidate, expected=None, lease=self._lease
                )
                if self._term is None:
                    # A watch need not show a leader that came and went between two looks, so the store is asked too.
                    await wait_within(self._clock, min(_ASK_S, self._ttl_s / 4), changed.wait())
                    changed.clear()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _tell_removals(self, changed: asyncio.Event) -> None:
        async for event in self._discovery.watch(self._key):
            if isinstance(event, RecordDeleted):
                changed.set()

    async def _watch_over(self, term: int) -> None:
        with contextlib.suppress(DynamoError):
            async for event in self._discovery.watch(self._key):
                if not await self._still_there(event, term):
                    break
        self._term = None

    async def _still_there(self, event: WatchEvent, term: int) -> bool:
        if isinstance(event, RecordDeleted):
            return False
        if isinstance(event, RecordPut):
            return event.revision == term
        # A rebuilt view may still show what a store that came back empty no longer has.
        record = await self._discovery.get(self._key)
        return record is not None and record.revision == term


class Barrier:
    """Members of a group wait for each other, and learn what each has brought.

    Args:
        discovery: Started discovery plane.
        name: Name of the barrier.
        size: How many members there must be.
        ttl_s: Time after which a member that died before completion counts as not there.
    """

    def __init__(self, discovery: Discovery, name: str, *, size: int, ttl_s: float = DEFAULT_LEASE_TTL_S) -> None:
        self._discovery = discovery
        self._prefix = f"{BARRIERS_PREFIX}{quote_segment(name)}/"
        self._members = f"{self._prefix}members/"
        self._latch = f"{self._prefix}complete"
        self._size = size
        self._ttl_s = ttl_s
        self._lease: Lease | None = None

    async def arrive(self, member: str, value: bytes = b"") -> dict[str, bytes]:
        """Return all members' values by name once all are there. Cancelling leaves the barrier.

        Raises:
            ConflictError: if a member of that name is there, or the barrier was completed by others.
            UnavailableError: if discovery cannot be reached.
        """
        self._lease = await self._discovery.lease(self._ttl_s)
        try:
            return await self._wait(member, value)
        except BaseException:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Take this member's record back. The last to leave a barrier frees its name. Idempotent."""
        lease, self._lease = self._lease, None
        if lease is not None:
            with contextlib.suppress(DynamoError):
                await lease.revoke()

    async def _wait(self, member: str, value: bytes) -> dict[str, bytes]:
        key = self._members + quote_segment(member)
        if (
            await self._discovery.compare_and_set(
                key, msgspec.msgpack.encode((member, value)), expected=None, lease=self._lease
            )
            is None
        ):
            raise ConflictError(f"member {member!r} is at the barrier {self._prefix} already; use another name")
        view: dict[str, bytes] = {}
        synced = False
        async for event in self._discovery.watch(self._prefix):
            synced = synced or isinstance(event, WatchSynced)
            if isinstance(event, RecordPut):
                view[event.key] = event.value
            elif isinstance(event, RecordDeleted):
                view.pop(event.key, None)
            if synced and (found := await self._complete(view)) is not None:
                if found.get(member) != value:
                    raise ConflictError(f"the barrier {self._prefix} was completed by others; use another name")
                return found
        raise UnavailableError("discovery was closed while waiting at a barrier", reason="discovery.closed")

    async def _complete(self, view: dict[str, bytes]) -> dict[str, bytes] | None:
        present = view.get(self._latch)
        if present is None:
            members = [view[key] for key in sorted(view) if key.startswith(self._members)]
            if len(members) < self._size:
                return None
            # One list counts for all, however many members crowd in at the end.
            chosen = msgspec.msgpack.encode([msgspec.Raw(each) for each in members[: self._size]])
            await self._discovery.compare_and_set(self._latch, chosen, expected=None, lease=self._lease)
            record = await self._discovery.get(self._latch)
            if record is None:
                return None
            present = record.value
        return dict(msgspec.msgpack.decode(present, type=list[tuple[str, bytes]]))
