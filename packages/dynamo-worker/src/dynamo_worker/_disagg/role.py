"""Puts an engine into its role: what serves requests, what the card says, and which endpoints come with it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from dynamo_core.component import ComponentContext
from dynamo_core.discovery import Instance
from dynamo_core.engine import Engine, EngineConfig, SupportsSubmit
from dynamo_core.enums import Modality, WorkerType
from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import EndpointId, InstanceId, format_instance_id
from dynamo_core.wire import TRANSFER_REQUEST
from dynamo_worker._disagg.decode import DecodeOptions, RemotePrompt
from dynamo_worker._disagg.encode import EncodeEngine, EncodeOptions, RemoteEncoding, SupportsEncode
from dynamo_worker._disagg.handoff import TRANSFER_ENDPOINT, SupportsKvHandoff
from dynamo_worker._disagg.leases import LeaseTable
from dynamo_worker._disagg.nixl import NixlPool, load_agent
from dynamo_worker._disagg.peers import Peers
from dynamo_worker._disagg.prefill import PrefillEngine
from dynamo_worker._disagg.prepared import PreparingEngine
from dynamo_worker._disagg.pull import BlockPuller
from dynamo_worker._disagg.rooms import Rooms
from dynamo_worker._disagg.segments import MAX_SEGMENTS, SEGMENT_SLOTS, segment_pool, slot_bytes
from dynamo_worker._disagg.transfer import TransferHandler
from dynamo_worker._metrics import WorkerMetrics
from dynamo_worker._settings import WorkerSettings

_TYPES = {
    "agg": WorkerType.AGGREGATED,
    "prefill": WorkerType.PREFILL,
    "decode": WorkerType.DECODE,
    "encode": WorkerType.ENCODE,
}
_ENCODE_NEEDS = ((WorkerType.PREFILL, WorkerType.DECODE), (WorkerType.AGGREGATED,))
_SHARE_OF_BLOCKS = 2


class Role:
    """An engine in its role.

    Args:
        engine: A started engine.
        config: What it says of itself.
        settings: The role and its options.
        context: What the process offers.
        metrics: Where counts go.

    Attributes:
        engine: What serves requests.
        config: What the card is made from.
        instances: Endpoints to register besides the worker's own.
    """

    def __init__(
        self,
        engine: Engine,
        config: EngineConfig,
        *,
        settings: WorkerSettings,
        context: ComponentContext,
        metrics: WorkerMetrics,
    ) -> None:
        self.engine = engine
        self.config = config
        self.instances: list[Instance] = []
        self._settings = settings
        self._context = context
        self._metrics = metrics
        self._leases: LeaseTable | None = None
        self._rooms = Rooms(metrics)
        self._exit = AsyncExitStack()

    @property
    def kv_transfers(self) -> int | None:
        """Prompts that wait here to be pulled; None in a role that hands nothing over."""
        return len(self._leases) if self._leases is not None else None

    async def start(self, endpoint: EndpointId, instance_id: InstanceId, facts: dict[str, str]) -> None:
        """Take the role that the settings name.

        Raises:
            ConfigurationError: if the engine cannot.
        """
        await self._take_role(endpoint, instance_id, facts)
        if self._settings.remote_encode and self._settings.role != "prefill":
            self._ask_encoders(endpoint)

    async def _take_role(self, endpoint: EndpointId, instance_id: InstanceId, facts: dict[str, str]) -> None:
        wanted = _TYPES[self._settings.role]
        if wanted is self.config.worker_type:
            return  # aggregated, or an engine that hands over in its own way
        if wanted is WorkerType.AGGREGATED:
            raise ConfigurationError(
                f"engine {type(self.engine).__name__} is set up as {self.config.worker_type.value}; "
                f"give --role {self.config.worker_type.value} too"
            )
        if wanted is WorkerType.ENCODE:
            self._start_encode()
            return
        blocks = self._require_blocks()
        if self.config.runtime_config.data_parallel_size > 1:
            raise ConfigurationError(
                f"a hand-off names no dp rank, so --role {self._settings.role} needs an engine with one; "
                "start a worker for each rank"
            )
        if wanted is WorkerType.PREFILL:
            await self._start_prefill(blocks, endpoint, instance_id, facts)
        else:
            self._start_decode(blocks, endpoint, instance_id)

    async def wait_pulled(self) -> None:
        """Return once every prompt computed here was pulled or has expired. Cancellation only ends the wait."""
        if self._leases is not None:
            await self._leases.wait_empty()

    def notify_blocks(self) -> None:
        """Blocks came or went: whoever waits for some looks again."""
        self._rooms.notify()

    async def close(self) -> None:
        """End transfers and leases. Idempotent."""
        await self._exit.aclose()

    async def _start_prefill(
        self, blocks: SupportsKvHandoff, endpoint: EndpointId, instance_id: InstanceId, facts: dict[str, str]
    ) -> None:
        settings, clock = self._settings, self._context.clock
        total = self.config.runtime_config.total_kv_blocks or 0
        self._leases = leases = LeaseTable(
            blocks,
            lease_s=settings.kv_lease_s,
            max_blocks=max(1, total // _SHARE_OF_BLOCKS),
            clock=clock,
            metrics=self._metrics,
        )
        self._exit.push_async_callback(leases.close)
        segments = None
        if settings.kv_shared_memory:
            segments = segment_pool(blocks.block_access().layout.block_bytes)
            self._exit.callback(segments.close)
        nixl = self._nixl_pool(blocks, instance_id, SEGMENT_SLOTS)
        handler = TransferHandler(
            blocks,
            leases,
            self._rooms,
            segments=segments,
            nixl=nixl,
            timeout_s=settings.kv_transfer_timeout_s,
            clock=clock,
            metrics=self._metrics,
        )
        transfer = EndpointId(endpoint.namespace, endpoint.component, TRANSFER_ENDPOINT)
        served = await self._context.request_plane.serve(transfer, handler, schema=TRANSFER_REQUEST.schema)
        self._exit.push_async_callback(served.close)
        self._spawn(leases.sweep(), f"{endpoint.component} KV leases")
        self.instances = [Instance(transfer, instance_id, served.address, metadata=facts)]
        if settings.remote_encode:  # the prompt is computed from encoded media, handed over by the hash of the raw ones
            self._ask_encoders(endpoint)
        self.engine = engine = PrefillEngine(
            self.engine,
            blocks,
            leases,
            self._rooms,
            endpoint=transfer,
            address=served.address,
            instance_id=instance_id,
            shared_memory=segments.marker if segments is not None else "",
            nixl=nixl is not None,
        )
        runtime = msgspec.structs.replace(
            self.config.runtime_config, disaggregated_endpoint=engine.place.to_parameters()
        )
        self.config = msgspec.structs.replace(self.config, worker_type=WorkerType.PREFILL, runtime_config=runtime)

    def _nixl_pool(self, blocks: SupportsKvHandoff, instance_id: InstanceId, slots: int) -> NixlPool | None:
        if not self._settings.kv_nixl:
            return None
        agent = load_agent(format_instance_id(instance_id))
        pool = NixlPool(agent, slots * slot_bytes(blocks.block_access().layout.block_bytes), MAX_SEGMENTS)
        self._exit.callback(pool.close)
        return pool

    def _start_decode(self, blocks: SupportsKvHandoff, endpoint: EndpointId, instance_id: InstanceId) -> None:
        settings, context = self._settings, self._context
        if not isinstance(self.engine, SupportsSubmit):
            raise ConfigurationError(f"engine {type(self.engine).__name__} takes no pushed sinks; use --role agg")
        prefill = EndpointId(endpoint.namespace, settings.prefill_component, endpoint.endpoint)
        peers = Peers(WorkerType.PREFILL, context.discovery, context.request_plane, prefill, context.clock)
        puller = BlockPuller(
            blocks,
            context.request_plane,
            timeout_s=settings.kv_transfer_timeout_s,
            metrics=self._metrics,
            use_shared_memory=settings.kv_shared_memory,
            nixl=self._nixl_pool(blocks, instance_id, 1),
            clock=context.clock,
        )
        self._exit.callback(puller.close)
        prompt = RemotePrompt(
            blocks,
            model=settings.served_model_name or self.config.model,
            peers=peers,
            puller=puller,
            options=DecodeOptions(
                settings.remote_prefill_threshold_tokens,
                settings.prefill_timeout_s,
                settings.local_prefill,
                bootstrap=settings.kv_handoff == "bootstrap",
            ),
            clock=context.clock,
            metrics=self._metrics,
        )
        engine = PreparingEngine(self.engine, prompt)
        self._exit.push_async_callback(engine.close)
        if settings.remote_prefill_threshold_tokens is not None:
            self._spawn(peers.watch_instances(), "prefill instances")
            self._spawn(peers.watch_models(), "prefill models")
        self.engine = engine
        needs = () if settings.local_prefill else ((WorkerType.PREFILL,),)
        self.config = msgspec.structs.replace(self.config, worker_type=WorkerType.DECODE, needs=needs)

    def _start_encode(self) -> None:
        engine = self.engine
        if not isinstance(engine, SupportsEncode) or Modality.IMAGE not in self.config.input_modalities:
            raise ConfigurationError(
                f"engine {type(engine).__name__} has no encoder, which --role encode needs; "
                "use --role agg, or --image-encoder with the reference engine"
            )
        self.engine = EncodeEngine(engine, engine)
        self.config = msgspec.structs.replace(self.config, worker_type=WorkerType.ENCODE, needs=_ENCODE_NEEDS)

    def _ask_encoders(self, endpoint: EndpointId) -> None:
        settings, context = self._settings, self._context
        if not isinstance(self.engine, SupportsSubmit):
            raise ConfigurationError(
                f"engine {type(self.engine).__name__} takes no pushed sinks; leave out --remote-encode"
            )
        encoders = EndpointId(endpoint.namespace, settings.encode_component, endpoint.endpoint)
        peers = Peers(WorkerType.ENCODE, context.discovery, context.request_plane, encoders, context.clock)
        encoding = RemoteEncoding(
            model=settings.served_model_name or self.config.model,
            peers=peers,
            options=EncodeOptions(settings.encode_timeout_s, settings.local_encode),
            clock=context.clock,
            metrics=self._metrics,
        )
        engine = PreparingEngine(self.engine, encoding)
        self._exit.push_async_callback(engine.close)
        self._spawn(peers.watch_instances(), "encode instances")
        self._spawn(peers.watch_models(), "encode models")
        self.engine = engine

    def _require_blocks(self) -> SupportsKvHandoff:
        engine, role = self.engine, self._settings.role
        if not isinstance(engine, SupportsKvHandoff) or not self.config.kv_block_size:
            raise ConfigurationError(
                f"engine {type(engine).__name__} cannot hand KV blocks over, which --role {role} needs; "
                "use --role agg, or the engine's own flags for disaggregation"
            )
        return engine

    def _spawn(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        task = self._context.spawn(loop, name=name)
        self._exit.push_async_callback(_cancelled, task)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
