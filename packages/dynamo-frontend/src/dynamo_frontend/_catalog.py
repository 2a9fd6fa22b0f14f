"""The models that can be served, learnt from discovery."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import structlog

from dynamo_core.cards import ModelCard, is_model_ready
from dynamo_core.component import ComponentContext
from dynamo_core.discovery import INSTANCES_PREFIX, MODELS_PREFIX, Instance, ModelRecord, RecordDeleted, RecordPut
from dynamo_core.enums import WorkerType
from dynamo_core.errors import DynamoError, NotFoundError, UnavailableError
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.routing import Router
from dynamo_core.wire import INSTANCE, MODEL_RECORD
from dynamo_frontend._metrics import FrontendMetrics
from dynamo_frontend._model import ModelText

_log = structlog.get_logger(__name__)
_ANSWERS = (WorkerType.AGGREGATED, WorkerType.DECODE)


@dataclass(slots=True)
class ServedModel:
    """One model with what it takes to serve it.

    Attributes:
        card: Card that all admitted workers agree on.
        endpoint: Endpoint of the workers that answer.
        created_s: Unix time at which it was first seen.
        text: Tokenizer and template.
        router: Chooses workers.
        records: Admitted records of every role, by key.
        conflicts: Workers whose card differs from the first of their role: kept out.
        neighbours: Every record at the endpoint by key, those of other models among them; shared by these models.
        ready: Whether a request can be routed.
    """

    card: ModelCard
    endpoint: EndpointId
    created_s: int
    text: ModelText
    router: Router
    records: dict[str, ModelRecord] = field(default_factory=dict[str, ModelRecord])
    conflicts: dict[str, ModelRecord] = field(default_factory=dict[str, ModelRecord])
    neighbours: dict[str, ModelRecord] = field(default_factory=dict[str, ModelRecord])
    ready: bool = False
    _excluded: tuple[WorkerId, ...] | None = None

    @property
    def name(self) -> str:
        """Served name."""
        return self.card.name

    @property
    def answering(self) -> bool:
        """Whether any admitted worker answers requests."""
        return any(record.card.worker_type in _ANSWERS for record in self.records.values())

    @property
    def excluded(self) -> tuple[WorkerId, ...]:
        """Workers at the endpoint that the router must not use: of another model or role, or kept out."""
        if self._excluded is None:
            own = {record.instance_id for record in self.records.values() if self._answers(record)}
            others = [record for record in self.neighbours.values() if record.instance_id not in own]
            found = (WorkerId(record.instance_id, rank) for record in others for rank in _ranks(record.card))
            self._excluded = tuple(dict.fromkeys(found))
        return self._excluded

    def refresh(self) -> None:
        """Work out again who must not be used, when it is asked for next."""
        self._excluded = None

    def _answers(self, record: ModelRecord) -> bool:
        return record.endpoint == self.endpoint and record.card.worker_type in _ANSWERS

    def agrees(self, record: ModelRecord) -> bool:
        """Whether a record's card says what the admitted ones of its role say."""
        card = record.card
        if card.worker_type in _ANSWERS:
            return _answering_checksum(card) == _answering_checksum(self.card)
        role = (other for other in self.records.values() if other.card.worker_type is card.worker_type)
        peer = next(role, None)
        return peer is None or peer.card.checksum == card.checksum


Admit = Callable[[ModelRecord], Awaitable[tuple[ModelText, Router]]]
"""Loads a new model's text side and starts its router."""


class Catalog:
    """Watches models and instances.

    The first card of each role sets what the others of that role must agree on: workers that answer form one role,
    whether they prefill themselves or not, and each other worker type is one. A worker whose card differs is kept out,
    is logged and counted, and makes the model degraded, not broken.
    """

    def __init__(self, context: ComponentContext, metrics: FrontendMetrics, admit: Admit) -> None:
        self._context = context
        self._metrics = metrics
        self._admit = admit
        self._models: dict[str, ServedModel] = {}
        self._names: dict[str, ServedModel] = {}
        self._instances: dict[tuple[EndpointId, int], Instance] = {}
        self._failed: dict[str, str] = {}
        self._waiting: dict[str, ModelRecord] = {}
        self._records: dict[EndpointId, dict[str, ModelRecord]] = {}

    async def watch_instances(self) -> None:
        """Follow instances until cancelled."""
        async for event in self._context.discovery.watch(INSTANCES_PREFIX):
            if isinstance(event, RecordPut):
                instance = INSTANCE.decode(event.value)
                self._instances[(instance.endpoint, instance.instance_id)] = instance
            elif isinstance(event, RecordDeleted):
                self._instances = {k: v for k, v in self._instances.items() if v.key != event.key}
            self._show_states()

    async def watch_models(self) -> None:
        """Follow model records until cancelled."""
        async for event in self._context.discovery.watch(MODELS_PREFIX):
            if isinstance(event, RecordPut):
                await self.add(MODEL_RECORD.decode(event.value))
            elif isinstance(event, RecordDeleted):
                await self.remove(event.key)
            self._show_states()

    async def add(self, record: ModelRecord) -> None:
        """Take a record in: a new model, one more worker, or a conflict."""
        if record.endpoint.namespace != self._context.namespace:
            return
        await self.remove(record.key, replaced=True)
        self._at(record.endpoint)[record.key] = record
        self._refresh(record.endpoint)
        model = self._models.get(record.card.name)
        if model is not None and not model.answering and record.card.checksum != model.card.checksum:
            await self._retire(model)
            model = None
        if model is not None:
            self._join(model, record)
        elif record.card.worker_type in _ANSWERS:
            await self._found(record)
        else:
            self._waiting[record.key] = record

    async def remove(self, key: str, *, replaced: bool = False) -> None:
        """Forget a record; a model without workers that answer is gone."""
        self._waiting.pop(key, None)
        self._failed.pop(key, None)
        self._forget(key)
        for model in list(self._models.values()):
            if model.conflicts.pop(key, None) is not None:
                model.refresh()
            if model.records.pop(key, None) is None:
                continue
            if not model.answering and not replaced:
                await self._retire(model)
            elif model.answering:
                self._take_up(model)

    def _at(self, endpoint: EndpointId) -> dict[str, ModelRecord]:
        return self._records.setdefault(endpoint, {})

    def _forget(self, key: str) -> None:
        for endpoint, records in list(self._records.items()):
            if records.pop(key, None) is not None:
                self._refresh(endpoint)
                if not records and all(model.endpoint != endpoint for model in self._models.values()):
                    del self._records[endpoint]

    def _refresh(self, endpoint: EndpointId) -> None:
        for model in self._models.values():
            if model.endpoint == endpoint:
                model.refresh()

    def find(self, name: str) -> ServedModel:
        """Return a ready model by name, alias or ``base:adapter``.

        Raises:
            NotFoundError: if there is no model of this name.
            UnavailableError: if it is known but not ready.
        """
        model = self._names.get(name) or self._adapter(name)
        if model is None:
            known = ", ".join(sorted(self._models)) or "none"
            raise NotFoundError(
                f"The model '{name}' does not exist; models served here: {known}.",
                reason="model_not_found",
                param="model",
            )
        if not model.ready:
            raise UnavailableError(
                f"The model '{name}' is known but no complete set of workers is up; try again soon.",
                reason="backend.unavailable",
                retry_after_s=1.0,
            )
        return model

    def _adapter(self, name: str) -> ServedModel | None:
        """Return the adapter of a name such as ``base:adapter``, if it is one of that base model's."""
        base, _, adapter = name.rpartition(":")
        model, base_model = self._names.get(adapter), self._names.get(base)
        if model is None or base_model is None or model.card.lora is None:
            return None
        return model if model.card.lora.base_model == base_model.name else None

    def _is_ready(self, model: ServedModel) -> bool:
        """Whether a request can be routed: each role is present, and a worker that answers is reachable."""
        if not is_model_ready([record.card for record in model.records.values()]):
            return False
        return any(
            (record.endpoint, record.instance_id) in self._instances
            for record in model.records.values()
            if record.endpoint == model.endpoint
        )

    def models(self) -> list[ServedModel]:
        """Return the ready models by name."""
        return [model for _, model in sorted(self._models.items()) if model.ready]

    def failures(self) -> list[str]:
        """Return why models could not be admitted."""
        return sorted(set(self._failed.values()))

    async def address(self, endpoint: EndpointId, instance_id: int) -> str:
        """Return where a worker is reached.

        Raises:
            UnavailableError: if discovery does not know it any more.
        """
        instance = self._instances.get((endpoint, instance_id))
        if instance is None:
            # A router may hear of a worker a moment before this watch does.
            record = await self._context.discovery.get(Instance(endpoint, instance_id, "").key)
            if record is None:
                raise UnavailableError(
                    f"Worker {instance_id:x} of {endpoint} left before the request reached it.",
                    reason="transport.cannot_connect",
                )
            instance = INSTANCE.decode(record.value)
        return instance.address

    async def close(self) -> None:
        """Stop all routers."""
        for model in list(self._models.values()):
            await self._drop(model)

    async def _found(self, record: ModelRecord) -> None:
        try:
            text, router = await self._admit(record)
        except DynamoError as error:
            self._failed[record.key] = f"model {record.card.name!r}: {error.message}"
            _log.error("model not admitted", model=record.card.name, reason=error.message)
            return
        created = int(self._context.clock.time())
        records, neighbours = {record.key: record}, self._at(record.endpoint)
        model = ServedModel(record.card, record.endpoint, created, text, router, records, neighbours=neighbours)
        self._models[model.name] = model
        for name in (model.name, *record.card.aliases):
            self._names.setdefault(name, model)
        for key, waiting in list(self._waiting.items()):
            if waiting.card.name == model.name:
                self._join(model, self._waiting.pop(key))
        self._show_states()
        _log.info("model admitted", model=model.name, endpoint=str(model.endpoint))

    def _join(self, model: ServedModel, record: ModelRecord) -> None:
        if model.agrees(record):
            model.records[record.key] = record
        else:
            model.conflicts[record.key] = record
            _log.error(
                "worker kept out: its card differs from the others of its role",
                model=model.name,
                worker=f"{record.instance_id:x}",
                role=record.card.worker_type.value,
                card=record.card.checksum,
            )
        model.refresh()

    def _take_up(self, model: ServedModel) -> None:
        """Let in who was kept out for the sake of workers that are gone."""
        for key, record in list(model.conflicts.items()):
            if model.agrees(record):
                del model.conflicts[key]
                self._join(model, record)
        model.refresh()

    async def _retire(self, model: ServedModel) -> None:
        await self._drop(model)
        # Whoever was kept out, or serves another role, may found the model anew.
        for record in [*model.conflicts.values(), *model.records.values()]:
            await self.add(record)

    async def _drop(self, model: ServedModel) -> None:
        self._models.pop(model.name, None)
        self._names = {name: known for name, known in self._names.items() if known is not model}
        self._metrics.forget_model(model.name)
        model.text.tokenizer.close()
        await model.router.stop()
        _log.info("model retired", model=model.name)

    def _show_states(self) -> None:
        for model in self._models.values():
            model.ready = self._is_ready(model)
            self._metrics.model_state(model.name, ready=model.ready, conflicts=len(model.conflicts))


def _answering_checksum(card: ModelCard) -> str:
    """Return what aggregated and decode workers of one model must agree on: their role is no difference."""
    return msgspec.structs.replace(card, worker_type=WorkerType.AGGREGATED, needs=()).checksum


def _ranks(card: ModelCard) -> range:
    start = card.runtime_config.data_parallel_start_rank
    return range(start, start + card.runtime_config.data_parallel_size)
