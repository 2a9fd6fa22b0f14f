"""Loads a model and puts the parts of an engine core together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockLayout, KvConnector
from dynamo_worker._reference._block_pool import BlockPool
from dynamo_worker._reference._config import ModelConfig
from dynamo_worker._reference._core import EngineCore
from dynamo_worker._reference._encoder import ImageEncoder
from dynamo_worker._reference._events import BlockEvents
from dynamo_worker._reference._invariance import is_batch_invariant
from dynamo_worker._reference._kv_cache import KVCache
from dynamo_worker._reference._model import LlamaModel
from dynamo_worker._reference._safetensors import SafetensorsFolder
from dynamo_worker._reference._scheduler import Scheduler, SchedulerLimits
from dynamo_worker._reference._settings import ReferenceSettings


@dataclass(frozen=True)
class LoadedEngine:
    """The cores of all ranks, with what they were made from."""

    cores: tuple[EngineCore, ...]
    config: ModelConfig
    max_context: int
    is_batch_invariant: bool = False


def load_engine(
    settings: ReferenceSettings, events: Sequence[BlockEvents], connector: KvConnector | None
) -> LoadedEngine:
    """Load the model and build a core for each receiver of events. Blocks; BLAS threads are set for the whole process.

    Raises:
        ConfigurationError: if the model cannot be loaded or its context does not fit in the blocks.
    """
    threadpool_limits(limits=settings.num_threads, user_api="blas")
    folder = settings.model_folder
    config = ModelConfig.load(folder)
    max_context = _max_context(settings, config)
    model = load_model(settings, config, max_context)
    layout = BlockLayout(
        config.num_layers, settings.block_size, config.num_kv_heads, config.head_dim, settings.kv_cache_dtype
    )
    limits = SchedulerLimits(
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    encoder = ImageEncoder(config.hidden_size, model.embedding_scale) if settings.image_encoder else None
    cores: list[EngineCore] = []
    for heard in events:
        pool = BlockPool(settings.num_blocks, heard)
        scheduler = Scheduler(limits, pool, connector)
        cache = KVCache(layout, settings.num_blocks)
        cores.append(
            EngineCore(
                model,
                cache,
                pool,
                scheduler,
                max_context=max_context,
                eos_token_ids=config.eos_token_ids,
                encoder=encoder,
            )
        )
    return LoadedEngine(tuple(cores), config, max_context, is_batch_invariant(model, layout, max_context))


def load_model(settings: ReferenceSettings, config: ModelConfig, max_context: int) -> LlamaModel:
    """Load the weights. Blocks.

    Raises:
        ConfigurationError: if they cannot be loaded.
    """
    return LlamaModel(config, SafetensorsFolder(settings.model_folder), max_context)


def _max_context(settings: ReferenceSettings, config: ModelConfig) -> int:
    wanted = settings.max_model_len or config.max_context
    if wanted > config.max_context:
        raise ConfigurationError(
            f"option --max-model-len has the value {wanted}, the model's context is {config.max_context}; lower it"
        )
    room = settings.num_blocks * settings.block_size
    if room < wanted:
        raise ConfigurationError(
            f"option --num-blocks has the value {settings.num_blocks}: {settings.num_blocks} blocks of "
            f"{settings.block_size} tokens hold {room} tokens, one request may need {wanted}; "
            f"use --num-blocks {-(-wanted // settings.block_size)} or --max-model-len {room}"
        )
    return wanted
