from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.cards import CheckedFile, ModelRuntimeConfig
from dynamo_core.engine import EngineConfig
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError
from dynamo_worker import MockEngine, WorkerSettings, create_worker
from dynamo_worker._mock import MockSettings


async def test_a_worker_registers_its_endpoint_and_card(process: Any, kit: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    config = EngineConfig(
        "base",
        model_path=str(tmp_path),
        context_length=512,
        eos_token_ids=(2,),
        runtime_config=ModelRuntimeConfig(max_num_seqs=3),
    )
    worker = await process.worker(kit.ScriptedEngine(config=config), served_model_name="tiny", reasoning_parser="think")
    (instance,) = await process.instances()
    assert str(instance.endpoint) == "test.backend.generate"
    assert (instance.instance_id, instance.address) == (worker.instance_id, worker.address)
    assert instance.metadata["pid"] == str(os.getpid())
    assert set(instance.metadata) == {"host", "pid", "version"}
    (record,) = await process.models()
    card = record.card
    assert (card.name, card.context_length, card.eos_token_ids) == ("tiny", 512, (2,))
    assert card.files == {
        "tokenizer": CheckedFile("tokenizer.json", hashlib.blake2b(b"{}", digest_size=16).hexdigest()),
        "chat_template": CheckedFile(
            "chat_template.jinja", hashlib.blake2b(b"{{ messages }}", digest_size=16).hexdigest()
        ),
    }
    assert (card.runtime_config.max_num_seqs, card.runtime_config.reasoning_parser) == (3, "think")
    assert card.runtime_config.enable_local_indexer is False


async def test_a_lost_lease_shows_in_health(process: Any, kit: Any) -> None:
    worker = await process.worker(kit.ScriptedEngine())
    assert process.context.health.ready
    await process.discovery.close()
    assert worker.health().state is HealthState.DEGRADED


async def test_a_missing_model_folder_names_itself(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine(config=EngineConfig("m", model_path="/nowhere/at/all"))
    with pytest.raises(ConfigurationError, match="/nowhere/at/all does not exist"):
        await process.worker(engine)


async def test_engines_are_built_from_the_flags_the_host_does_not_know(process: Any) -> None:
    worker = create_worker(process.context, WorkerSettings(engine="mock"), engine_args=["--model-name", "m1"])
    process.workers.append(worker)
    await worker.start()
    assert [record.card.name for record in await process.models()] == ["m1"]


def test_wrong_engine_flags_name_the_flag(process: Any) -> None:
    with pytest.raises(ConfigurationError, match="--kv-blok-size"):
        create_worker(process.context, WorkerSettings(engine="mock"), engine_args=["--kv-blok-size", "4"])
    with pytest.raises(ConfigurationError, match="no engines plug-in is named 'warp'"):
        create_worker(process.context, WorkerSettings(engine="warp"))
    with pytest.raises(ConfigurationError, match="already built"):
        create_worker(process.context, engine=MockEngine(), engine_args=["--x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_events": False, "kv_index_blocks": 5}, "--kv-index-blocks has no effect here"),
        ({"kv_connector_options": {"a": 1}}, "--kv-connector-options has no effect here"),
        ({"request_queue_limit": 0, "request_queue_timeout_ms": 5.0}, "--request-queue-timeout-ms has no effect"),
        ({"load_interval_s": 5.0}, "--load-heartbeat-s 1.0 is less than --load-interval-s 5.0"),
        ({"worker_endpoint": "a.b"}, "worker_endpoint"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerSettings(**options)


def test_options_the_engine_would_ignore_are_refused(process: Any, kit: Any) -> None:
    with pytest.raises(ConfigurationError, match="reports no KV events"):
        create_worker(process.context, WorkerSettings(kv_events=True), engine=kit.ScriptedEngine())
    with pytest.raises(ValueError, match="--vocab-size has no effect with --model"):
        MockSettings(model="/m", vocab_size=100)
