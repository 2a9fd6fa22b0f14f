"""One planner of several decides: a key under a lease says which, and a record fences off the ones before it."""

from __future__ import annotations

import structlog

from dynamo_core.discovery import Discovery, Lease, quote_segment
from dynamo_core.errors import ConflictError, UnavailableError

LEADER_TTL_S = 15.0

_log = structlog.get_logger(__name__)


class Election:
    """Leadership of one namespace's planner.

    The leader's key lives under a lease, so it vanishes with its process. Before a decision is carried out, its
    identity is written by compare-and-set over the one before: a leader that was suspended and replaced finds the
    record moved on, and steps down instead of scaling.

    Args:
        discovery: Started discovery.
        namespace: Namespace of the deployment.
        name: Who this is, for people.
    """

    def __init__(self, discovery: Discovery, namespace: str, name: str) -> None:
        self._discovery = discovery
        self._leader_key = f"{quote_segment(namespace)}/planner/leader"
        self._record_key = f"{quote_segment(namespace)}/planner/last_decision"
        self._name = name.encode()
        self._lease: Lease | None = None
        self._leader_revision: int | None = None
        self._record_revision: int | None = None
        self.last_decision_id = 0

    @property
    def leading(self) -> bool:
        """Whether this one decides, as far as it knows."""
        return self._leader_revision is not None and self._lease is not None and self._lease.valid

    async def claim(self) -> bool:
        """Become the leader if there is none, or confirm that one still is; return whether one is.

        Raises:
            UnavailableError: if discovery cannot be reached.
        """
        record = await self._discovery.get(self._leader_key)
        if self.leading and record is not None and record.revision == self._leader_revision:
            return True
        self._leader_revision = None
        if record is not None:
            return False
        if self._lease is None or not self._lease.valid:
            self._lease = await self._discovery.lease(LEADER_TTL_S)
        try:
            self._leader_revision = await self._discovery.compare_and_set(
                self._leader_key, self._name, expected=None, lease=self._lease
            )
        except ConflictError:
            self._lease = None
        if self._leader_revision is None:
            return False
        await self._read_record()
        _log.info("leads the planners", after_decision=self.last_decision_id)
        return True

    async def fence(self, decision_id: int) -> bool:
        """Record a decision before it is carried out; return whether it may be."""
        revision = await self._discovery.compare_and_set(
            self._record_key, str(decision_id).encode(), expected=self._record_revision
        )
        if revision is None:
            _log.warning("another planner has decided meanwhile; stepping down")
            self._leader_revision = None
            return False
        self._record_revision, self.last_decision_id = revision, decision_id
        return True

    async def resign(self) -> None:
        """Let another lead. Idempotent; discovery that is away lets go when the lease ends."""
        self._leader_revision = None
        if self._lease is not None:
            lease, self._lease = self._lease, None
            try:
                await lease.revoke()
            except UnavailableError as error:
                _log.warning("leadership ends with its lease", error=error.message)

    async def _read_record(self) -> None:
        record = await self._discovery.get(self._record_key)
        self._record_revision = None if record is None else record.revision
        self.last_decision_id = 0 if record is None else int(record.value)
