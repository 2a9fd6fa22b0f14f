"""``DynamoKvConnector``: what vLLM loads by name.

::

    KVTransferConfig(kv_connector="DynamoKvConnector", kv_role="kv_both",
                     kv_connector_module_path="dynamo_kvbm._vllm_connector.connector",
                     kv_connector_extra_config={"host_blocks": 4096})

The extra configuration holds the options of ``KvbmSettings``. vLLM runs one side in its scheduler and one in each
worker; this module alone knows vLLM.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_kvbm._connector import KvbmConnector, create_connector
from dynamo_kvbm._settings import OffloadPolicy
from dynamo_kvbm._vllm_connector.plan import Changes, Plan
from dynamo_kvbm._vllm_connector.scheduler_side import SchedulerSide
from dynamo_kvbm._vllm_connector.worker_side import TensorBlocks, WorkerSide

_BASE: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")


@dataclass
class PlanMetadata(_BASE.KVConnectorMetadata):
    """A plan on its way to the workers."""

    plan: Plan


@dataclass
class ChangesMetadata(_BASE.KVConnectorWorkerMetadata):
    """Changes on their way to the scheduler."""

    changes: Changes

    def aggregate(self, other: ChangesMetadata) -> ChangesMetadata:
        """Return the changes of two workers together."""
        return ChangesMetadata(self.changes.merged(other.changes))


class DynamoKvConnector(_BASE.KVConnectorBase_V1):
    """The block manager as vLLM's KV connector.

    Args:
        vllm_config: vLLM's configuration.
        role: Which side this is.
        kv_cache_config: Shape of the KV cache.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = int(vllm_config.cache_config.block_size)
        self._num_blocks = int(getattr(kv_cache_config, "num_blocks", 0) or 0)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == _BASE.KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(self._block_size, int(vllm_config.parallel_config.world_size))
        else:
            self._worker = WorkerSide(_tiers(vllm_config.kv_transfer_config.kv_connector_extra_config))

    # The side of the workers.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Start the tiers on the worker's cache."""
        count = self._num_blocks or int(self._vllm_config.cache_config.num_gpu_blocks)
        torch = importlib.import_module("torch")
        self._of_worker.bind(TensorBlocks(torch, kv_caches, num_blocks=count, block_size=self._block_size))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy blocks in, before the forward pass."""
        self._of_worker.load(self._get_connector_metadata().plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: ``start_load_kv`` returns when all is there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing yet: a block is copied once, with all its layers, by ``wait_for_save``."""

    def wait_for_save(self) -> None:
        """Copy out what the forward pass completed."""
        self._of_worker.store(self._get_connector_metadata().plan)

    def build_connector_worker_meta(self) -> ChangesMetadata | None:
        """Return what the tiers gained and lost in this step."""
        changes = self._of_worker.take_changes()
        return ChangesMetadata(changes) if changes is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that did not arrive; vLLM computes them."""
        return self._of_worker.take_failed()

    def shutdown(self) -> None:
        """Release the tiers."""
        if self._worker is not None:
            self._worker.close()

    # The side of the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many more tokens the tiers hold; they are loaded within the step."""
        return self._of_scheduler.match(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Take note of where the matched tokens go."""
        self._of_scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> PlanMetadata:
        """Return the step's plan."""
        return PlanMetadata(self._of_scheduler.plan(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """Hear what the workers gained and lost."""
        found = getattr(connector_output, "kv_connector_worker_meta", None)
        if found is not None:
            self._of_scheduler.apply(found.changes)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its blocks were copied in the steps that completed them."""
        self._of_scheduler.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Empty the tiers with the next step."""
        self._of_scheduler.clear()
        return True

    @property
    def _of_scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None  # vLLM calls each side's methods on that side
        return self._scheduler

    @property
    def _of_worker(self) -> WorkerSide:
        assert self._worker is not None  # vLLM calls each side's methods on that side
        return self._worker


def _tiers(extra: Mapping[str, Any]) -> KvbmConnector:
    # vLLM does not say which blocks it is about to reuse, so that moment cannot be the one of offload.
    options = {"offload": OffloadPolicy.REGISTER.value, **extra}
    if options["offload"] == OffloadPolicy.EVICT.value:
        raise ConfigurationError("offload 'evict' cannot be had behind vLLM; use 'register' or 'second-touch'")
    return create_connector(options=options, clock=SystemClock(), metrics=Metrics())
