"""The TensorRT-LLM adapter on the real one, on a machine with a GPU: name this file to pytest there."""

from __future__ import annotations

from pathlib import Path

import pytest

import dynamo_worker
from dynamo_core.engine import Engine
from dynamo_core.testing import EngineConformance
from dynamo_worker._trtllm.engine import TrtllmEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

MODEL = Path(dynamo_worker.__file__).parent / "models" / "tinylm"
ARGUMENTS = '{"max_seq_len": 1024, "max_batch_size": 16, "kv_cache_config": {"free_gpu_memory_fraction": 0.2}}'


class TestRealTrtllm(EngineConformance):
    factory = TrtllmEngine
    patience_s = 300.0

    def make_engine(self) -> Engine:
        return TrtllmEngine.from_args(["--model", str(MODEL), "--trtllm-args", ARGUMENTS])
