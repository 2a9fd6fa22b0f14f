"""Contracts of the Dynamo serving stack: everything that its packages share, and nothing else.

Seven distributions meet here and import only this one: the **runtime** hosts processes and carries requests and
events, the **frontend** speaks HTTP, the **router** chooses workers, **workers** wrap engines, the **KV block manager**
keeps blocks beyond device memory, the **planner** scales. Each module holds one contract; read ``requests`` first, then
``engine``, ``routing`` and ``planes``. ``memory`` and ``noop`` have an in-process version of each, so that core alone
runs a request, and ``testing`` has the conformance suite that every implementation must pass.
"""

from typing import TYPE_CHECKING, Any

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.clock import Clock, SystemClock
from dynamo_core.component import Component, ComponentContext, Health, HealthBoard
from dynamo_core.content import ContentPart
from dynamo_core.enums import FinishReason, HealthState, Modality, Tier, WorkerType
from dynamo_core.errors import DynamoError
from dynamo_core.ids import EndpointId, InstanceId, WorkerId
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions, Usage
from dynamo_core.stability import beta, deprecated, experimental
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_tokens

if TYPE_CHECKING:
    from dynamo_core.settings import DynamoSettings as DynamoSettings

__all__ = [
    "BlockHasher",
    "Clock",
    "Component",
    "ComponentContext",
    "ContentPart",
    "DynamoError",
    "DynamoSettings",
    "EndpointId",
    "FinishReason",
    "GenerateChunk",
    "GenerateRequest",
    "Health",
    "HealthBoard",
    "HealthState",
    "InstanceId",
    "Modality",
    "ModelCard",
    "ModelRuntimeConfig",
    "SamplingOptions",
    "StopConditions",
    "SystemClock",
    "Tier",
    "Usage",
    "WorkerId",
    "WorkerType",
    "beta",
    "deprecated",
    "experimental",
    "pack_tokens",
    "unpack_tokens",
]


def __getattr__(name: str) -> Any:
    # Settings import pydantic, a third of a second on a slow machine; code that only needs values does not wait.
    if name == "DynamoSettings":
        from dynamo_core.settings import DynamoSettings

        return DynamoSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
