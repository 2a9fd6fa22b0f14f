"""A scaling target that is a few keys in discovery, for whoever really owns the replicas.

The planner writes ``num_prefill_workers``, ``num_decode_workers`` (or ``num_workers``) and then ``decision_id``. A
client of any kind reads them, acts, and writes ``scaled_decision_id``. All are decimal text; -1 is unset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_core.component import ComponentContext
from dynamo_core.discovery import Discovery, RecordPut, WatchSynced, quote_segment
from dynamo_core.errors import ConfigurationError, InvalidRequestError, NotFoundError, UnavailableError
from dynamo_core.planning import PoolState, ScalingTarget

UNSET = -1
DECISION_ID = "decision_id"
SCALED_DECISION_ID = "scaled_decision_id"
COUNT_KEYS = {"prefill": "num_prefill_workers", "decode": "num_decode_workers", "worker": "num_workers"}


def key_prefix(namespace: str) -> str:
    """Return the prefix of a namespace's keys."""
    return f"{quote_segment(namespace)}/planner/"


@dataclass(frozen=True)
class VirtualDecision:
    """What the planner wants, as a client reads it.

    Attributes:
        decision_id: Identity; -1 before the first.
        replicas: Wanted by role.
    """

    decision_id: int
    replicas: dict[str, int]


class VirtualTarget:
    """Writes decisions to discovery; a pool is ready once a client said that it scaled.

    Args:
        discovery: Started discovery.
        namespace: Namespace of the deployment.
        initial: Roles, with the replicas that each has before the first decision.
    """

    def __init__(self, discovery: Discovery, namespace: str, initial: Mapping[str, int]) -> None:
        self._keys = _Keys(discovery, namespace)
        self._initial = dict(initial)
        self._last_decision = 0

    async def start(self) -> None:
        """Write the initial counts where there are none."""
        for role, count in self._initial.items():
            if await self._keys.read(COUNT_KEYS[role]) == UNSET:
                await self._keys.write(COUNT_KEYS[role], count)

    async def state(self) -> Mapping[str, PoolState]:
        """Return the counts; they count as starting until a client has scaled.

        Raises:
            UnavailableError: if discovery cannot be reached.
        """
        done = await self._keys.read(SCALED_DECISION_ID) >= await self._keys.read(DECISION_ID)
        pools: dict[str, PoolState] = {}
        for role in self._initial:
            count = max(0, await self._keys.read(COUNT_KEYS[role]))
            pools[role] = PoolState(count if done else 0, 0 if done else count, desired=count)
        return pools

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        """Write the counts and then the decision's identity, which is what a client waits for.

        Raises:
            NotFoundError: for an unknown role.
            InvalidRequestError: for a count below 0.
            UnavailableError: if discovery cannot be reached.
        """
        for role, count in replicas.items():
            if role not in self._initial:
                raise NotFoundError(f"virtual target has no role {role!r}; it has {sorted(self._initial)}")
            if count < 0:
                raise InvalidRequestError(f"{count} replicas of {role!r} asked for; give at least 0", param=role)
        if decision_id and decision_id <= self._last_decision:
            return
        for role, count in replicas.items():
            await self._keys.write(COUNT_KEYS[role], count)
        # Clients wait for the number to grow, also after a planner that counts from the start again.
        last = max(0, await self._keys.read(DECISION_ID))
        await self._keys.write(DECISION_ID, max(decision_id, last + 1))
        self._last_decision = max(self._last_decision, decision_id)

    async def close(self) -> None:
        """The keys stay, for the replicas stay. Idempotent."""


class VirtualClient:
    """The other side: what a third party that owns the replicas uses.

    Args:
        discovery: Started discovery.
        namespace: Namespace of the deployment.
    """

    def __init__(self, discovery: Discovery, namespace: str) -> None:
        self._discovery = discovery
        self._prefix = key_prefix(namespace)
        self._keys = _Keys(discovery, namespace)

    async def get(self) -> VirtualDecision:
        """Return the newest decision."""
        counts = {role: await self._keys.read(key) for role, key in COUNT_KEYS.items()}
        known = {role: count for role, count in counts.items() if count != UNSET}
        return VirtualDecision(await self._keys.read(DECISION_ID), known)

    async def wait(self) -> VirtualDecision:
        """Return the next decision that was not completed yet. Cancellation only ends the wait.

        Raises:
            UnavailableError: if discovery ends the watch.
        """
        async for event in self._discovery.watch(self._prefix):
            changed = isinstance(event, RecordPut) and event.key.endswith(DECISION_ID)
            if not (changed or isinstance(event, WatchSynced)):
                continue
            decision = await self.get()
            if decision.decision_id > await self._keys.read(SCALED_DECISION_ID):
                return decision
        raise UnavailableError("discovery ended the watch on the planner's decisions")

    async def complete(self, decision: VirtualDecision) -> None:
        """Say that a decision has been carried out."""
        await self._keys.write(SCALED_DECISION_ID, decision.decision_id)


class _Keys:
    """Decimal numbers under one prefix."""

    def __init__(self, discovery: Discovery, namespace: str) -> None:
        self._discovery = discovery
        self._prefix = key_prefix(namespace)

    async def read(self, name: str) -> int:
        record = await self._discovery.get(self._prefix + name)
        if record is None:
            return UNSET
        try:
            return int(record.value)
        except ValueError as error:
            raise UnavailableError(f"key {self._prefix + name} holds {record.value!r}, which is no number") from error

    async def write(self, name: str, value: int) -> None:
        await self._discovery.put(self._prefix + name, str(value).encode())


def create_virtual_target(context: ComponentContext, options: Mapping[str, Any]) -> ScalingTarget:
    """Return the target over the process's discovery; options are role to initial replicas, ``worker`` 1 if empty.

    Raises:
        ConfigurationError: for a role that has no key, or a count that is no number.
    """
    initial = dict(options) or {"worker": 1}
    for role, count in initial.items():
        if role not in COUNT_KEYS or not isinstance(count, int) or count < 0:
            raise ConfigurationError(
                f"target 'virtual' got {role!r}: {count!r}; give a number of at least 0 for {', '.join(COUNT_KEYS)}"
            )
    return VirtualTarget(context.discovery, context.namespace, initial)
