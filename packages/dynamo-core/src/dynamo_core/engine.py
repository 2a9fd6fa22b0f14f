"""The engine contract: what an inference engine must do, and what it may offer beyond that.

Lifecycle, in this order, with calls never overlapping except ``generate`` and ``abort``:

``from_args`` → ``start`` → (``generate`` | ``abort``)* → ``drain`` → ``cleanup``

``cleanup`` also comes after a failed or missing ``start``, may come twice, and must then do nothing. A new ability is
a new capability Protocol (``SupportsKvEvents``, ...), found by ``isinstance``; the engine contract itself never grows
a required member within a major version.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from dynamo_core.cards import EndpointTypes, ModelRuntimeConfig
from dynamo_core.clock import Clock
from dynamo_core.enums import Modality, ModelInput, ModelType, Tier, WorkerType
from dynamo_core.errors import DynamoError
from dynamo_core.ids import InstanceId
from dynamo_core.kv import BlockAccess, BlockDescriptor, KvConnector
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


@dataclass(frozen=True)
class EngineContext:
    """What the host gives an engine at start.

    Attributes:
        instance_id: The worker's identity.
        clock: Time.
        metrics: Where engine metrics go.
        kv_connector: Block manager to offload to and onboard from, if one is configured.
        seed: Seed of whatever is random and not seeded by a request.
    """

    instance_id: InstanceId
    clock: Clock
    metrics: Metrics
    kv_connector: KvConnector | None = None
    seed: int = 0


class EngineConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an engine says about itself once it has started; the host makes the model card from it.

    Attributes:
        model: Served model name.
        model_path: Folder with tokenizer, template and configs, if there is one.
        context_length: Most tokens of prompt and output together; 0 if not applicable.
        kv_block_size: Tokens per KV block; 0 without a reusable KV cache.
        eos_token_ids: Tokens that end an output.
        capabilities: Abilities by name (``logprobs``, ``guided_decoding``, ``n``, ...).
        types: Schemas its endpoint takes and gives.
    """

    model: str
    model_path: str = ""
    context_length: int = 0
    kv_block_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    model_types: tuple[ModelType, ...] = (ModelType.CHAT, ModelType.COMPLETIONS)
    model_input: ModelInput = ModelInput.TOKENS
    input_modalities: tuple[Modality, ...] = (Modality.TEXT,)
    output_modalities: tuple[Modality, ...] = (Modality.TEXT,)
    worker_type: WorkerType = WorkerType.AGGREGATED
    needs: tuple[tuple[WorkerType, ...], ...] = ()
    capabilities: tuple[str, ...] = ()
    types: EndpointTypes = EndpointTypes()
    runtime_config: ModelRuntimeConfig = msgspec.field(default_factory=ModelRuntimeConfig)


@runtime_checkable
class Engine(Protocol):
    """An inference engine, for any modality."""

    async def start(self, context: EngineContext) -> EngineConfig:
        """Load the model; when this returns, ``generate`` accepts concurrent calls.

        Raises:
            ConfigurationError: if its arguments cannot work (missing folder, unknown architecture).
        """
        ...

    def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield chunks until one with a finish reason, for every choice; usage comes with the last.

        The engine watches ``context.stopped`` (or ``on_stop``) and then ends with ``FinishReason.CANCELLED`` within
        one step. Closing or cancelling the iterator also frees everything the request holds.

        Raises:
            InvalidRequestError: for a request it cannot serve, before the first chunk.
            CapacityExhaustedError: if it refuses for load.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request within one step; unknown ids are ignored."""
        ...

    async def drain(self) -> None:
        """Finish what runs; accept nothing new. Cancelling it stops the wait, not the work."""
        ...

    async def cleanup(self) -> None:
        """Release everything. Idempotent, and safe after a partial start."""
        ...


class EngineFactory(Protocol):
    """Entry of ``dynamo_core.engines``, usually the engine class."""

    def from_args(self, args: Sequence[str]) -> Engine:
        """Build an engine from command-line arguments, cheaply and without side effects.

        Raises:
            ConfigurationError: for an unknown flag or a bad value; the message names flag, value and remedy.
        """
        ...


class ChunkSink(Protocol):
    """Where a stepping engine pushes the chunks of one request. Called on the event loop."""

    def push(self, chunk: GenerateChunk) -> None:
        """Take the next chunk."""
        ...

    def fail(self, error: DynamoError) -> None:
        """End the request with an error."""
        ...


@runtime_checkable
class SupportsSubmit(Protocol):
    """Push form of ``generate``: no task and no queue per token. The host prefers it where it exists."""

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Accept a request; its chunks go to ``sink``, all those of one step in one event-loop tick.

        Raises:
            InvalidRequestError, CapacityExhaustedError: as ``generate``; then the sink hears nothing.
        """
        ...


class KvEventSink(Protocol):
    """Where an engine reports changes of its reusable blocks. May be called from any thread; order is kept."""

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        """Consecutive blocks of one sequence became reusable."""
        ...

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        """Blocks left a tier."""
        ...

    def cleared(self) -> None:
        """All blocks are gone."""
        ...


@runtime_checkable
class SupportsKvEvents(Protocol):
    """The engine reports KV changes; the host numbers and publishes them."""

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Called once before the first request."""
        ...


@runtime_checkable
class SupportsLoad(Protocol):
    """The engine knows its load."""

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return the present load. Cheap; called on the event loop."""
        ...


@runtime_checkable
class SupportsForwardPassMetrics(Protocol):
    """The engine reports each step."""

    def set_forward_pass_listener(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """``listener`` hears of every step, on the event loop."""
        ...


@runtime_checkable
class SupportsKvBlocks(Protocol):
    """The engine gives access to the bytes of its KV blocks, for offload and disaggregation."""

    def block_access(self) -> BlockAccess:
        """Return access to the device blocks."""
        ...

    async def export_blocks(self, sequence_hashes: Sequence[int]) -> list[bytes]:
        """Return the bytes of the longest prefix of these blocks that the device holds, pinned while copied."""
        ...

    async def import_blocks(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes]) -> int:
        """Put blocks into the device cache as if computed here; return how many, from the start, fitted."""
        ...


@runtime_checkable
class SupportsCacheControl(Protocol):
    """The prefix cache can be emptied."""

    async def clear_kv_blocks(self) -> int:
        """Drop all unreferenced cached blocks; return how many."""
        ...


@runtime_checkable
class SupportsLora(Protocol):
    """LoRA adapters can come and go at run time."""

    async def load_lora(self, name: str, path: str) -> None:
        """Load an adapter. Raises ``ConflictError`` if the name is taken, ``NotFoundError`` if the path is empty."""
        ...

    async def unload_lora(self, name: str) -> None:
        """Unload it once no request uses it. Raises ``NotFoundError`` for an unknown name."""
        ...

    async def list_loras(self) -> list[str]:
        """Names of loaded adapters."""
        ...


@runtime_checkable
class SupportsSleep(Protocol):
    """The engine can give its memory back and come again."""

    async def sleep(self, level: int = 1) -> None:
        """Give memory back: level 1 keeps weights on the host, level 2 drops them."""
        ...

    async def wake(self) -> None:
        """Be ready again."""
        ...


@runtime_checkable
class SupportsControls(Protocol):
    """Engine-specific controls behind the admin API."""

    def controls(self) -> Sequence[str]:
        """Names of controls."""
        ...

    async def control(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run one. Raises ``NotFoundError`` for an unknown name."""
        ...
