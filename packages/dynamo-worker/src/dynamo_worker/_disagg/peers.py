"""The prefill or encode workers that serve a model, as discovery shows them, and how to ask one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import structlog

from dynamo_core.cards import ModelCard
from dynamo_core.clock import Clock
from dynamo_core.content import ContentPart
from dynamo_core.discovery import (
    INSTANCES_PREFIX,
    MODELS_PREFIX,
    Discovery,
    Instance,
    ModelRecord,
    RecordDeleted,
    RecordPut,
    endpoint_prefix,
)
from dynamo_core.enums import WorkerType
from dynamo_core.errors import BackendProtocolError, DynamoError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestPlane
from dynamo_core.requests import GenerateChunk, GenerateRequest, PrefillResult
from dynamo_core.streams import open_stream
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE, MODEL_RECORD
from dynamo_worker._disagg.handoff import HANDOFF_KIND, KvHandoff

COOLDOWN_S = 5.0

log = structlog.get_logger(__name__)


@dataclass
class _Peer:
    instance: Instance | None = None
    cards: dict[str, ModelCard] = field(default_factory=dict[str, ModelCard])
    resting_until_s: float = 0.0


class Peers:
    """Workers of one role behind one endpoint, asked in turn; one that failed rests for a while.

    Args:
        role: What they do.
        discovery: Where they register.
        plane: How they are reached.
        endpoint: Their generate endpoint.
        clock: Time.
    """

    def __init__(
        self, role: WorkerType, discovery: Discovery, plane: RequestPlane, endpoint: EndpointId, clock: Clock
    ) -> None:
        self.endpoint = endpoint
        self._role = role
        self._discovery = discovery
        self._plane = plane
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._turn = 0

    async def watch_instances(self) -> None:
        """Follow their instances until cancelled."""
        await self._watch(INSTANCES_PREFIX, self._put_instance, self._drop_instance)

    async def watch_models(self) -> None:
        """Follow their model cards until cancelled."""
        await self._watch(MODELS_PREFIX, self._put_model, self._drop_model)

    def choose(
        self, model: str, block_size: int | None = None, *, excluded: frozenset[int] = frozenset()
    ) -> Instance | None:
        """Return the next worker that serves the model, in blocks of that size if one is given; None without one."""
        now = self._clock.monotonic()
        fit = [
            peer.instance
            for _, peer in sorted(self._peers.items())
            if peer.instance is not None
            and peer.instance.instance_id not in excluded
            and peer.resting_until_s <= now
            and any(_fits(card, model, block_size) for card in peer.cards.values())
        ]
        self._turn += 1
        return fit[self._turn % len(fit)] if fit else None

    def meeting_place(self, instance: Instance) -> KvHandoff | None:
        """Return where that worker's blocks can be fetched while it computes; None if its card names no such place."""
        for peer in self._peers.values():
            if peer.instance is not None and peer.instance.instance_id == instance.instance_id:
                for card in peer.cards.values():
                    place = card.runtime_config.disaggregated_endpoint
                    if place is not None and place.get("kind") == HANDOFF_KIND:
                        return KvHandoff.from_result(PrefillResult(place))
        return None

    async def prefill(self, instance: Instance, request: GenerateRequest, *, deadline_s: float) -> PrefillResult:
        """Have a prompt computed. Cancelling the wait kills the call, which aborts the work there.

        Raises:
            DynamoError: what ended the call; after ``UnavailableError`` the worker rests.
            BackendProtocolError: if it answered without a hand-off.
        """
        chunks = await self._ask(instance, request, deadline_s)
        for chunk in reversed(chunks):
            if chunk.handoff is not None:
                return chunk.handoff
        raise BackendProtocolError("the prefill worker ended without a hand-off")

    async def encode(
        self, instance: Instance, request: GenerateRequest, *, deadline_s: float
    ) -> tuple[ContentPart, ...]:
        """Have a request's parts encoded; cancelling and errors as with ``prefill``.

        Raises:
            BackendProtocolError: if it answered with more or fewer parts.
        """
        chunks = await self._ask(instance, request, deadline_s)
        parts = tuple(part for chunk in chunks for part in chunk.parts)
        if len(parts) != len(request.parts):
            raise BackendProtocolError(f"the encode worker gave {len(parts)} parts for {len(request.parts)}")
        return parts

    async def _ask(self, instance: Instance, request: GenerateRequest, deadline_s: float) -> list[GenerateChunk]:
        asked = msgspec.structs.replace(request, deadline_s=deadline_s)
        options = CallOptions(request.request_id, deadline_s, schema=instance.types.request)
        payload = GENERATE_REQUEST.encode(asked)
        try:
            async with await open_stream(self._plane, instance.address, self.endpoint, payload, options) as stream:
                return [GENERATE_CHUNK.decode(item) async for item in stream]
        except UnavailableError as error:
            self._rest(instance, error)
            raise

    def _rest(self, instance: Instance, error: DynamoError) -> None:
        log.info("worker rests", role=self._role.value, instance=f"{instance.instance_id:x}", reason=error.reason)
        for peer in self._peers.values():
            if peer.instance is not None and peer.instance.instance_id == instance.instance_id:
                peer.resting_until_s = self._clock.monotonic() + COOLDOWN_S

    async def _watch(self, kind: str, put: Callable[[str, bytes], None], drop: Callable[[str], None]) -> None:
        prefix = kind + endpoint_prefix(self.endpoint)
        async for event in self._discovery.watch(prefix):
            if isinstance(event, RecordPut):
                put(event.key.removeprefix(prefix), event.value)
            elif isinstance(event, RecordDeleted):
                drop(event.key.removeprefix(prefix))

    def _put_instance(self, name: str, value: bytes) -> None:
        self._peers.setdefault(name, _Peer()).instance = INSTANCE.decode(value)

    def _drop_instance(self, name: str) -> None:
        if name in self._peers:
            self._peers[name].instance = None
            self._tidy(name)

    def _put_model(self, name: str, value: bytes) -> None:
        record: ModelRecord = MODEL_RECORD.decode(value)
        instance, _, suffix = name.partition("/")
        if record.card.worker_type is self._role:
            self._peers.setdefault(instance, _Peer()).cards[suffix] = record.card

    def _drop_model(self, name: str) -> None:
        instance, _, suffix = name.partition("/")
        if instance in self._peers:
            self._peers[instance].cards.pop(suffix, None)
            self._tidy(instance)

    def _tidy(self, name: str) -> None:
        peer = self._peers[name]
        if peer.instance is None and not peer.cards:
            del self._peers[name]


def _fits(card: ModelCard, model: str, block_size: int | None) -> bool:
    return block_size in (None, card.kv_block_size) and (card.name == model or model in card.aliases)
