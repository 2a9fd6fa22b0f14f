"""The SGLang adapter on real SGLang, on a machine with a GPU: name this file to pytest there."""

from __future__ import annotations

from pathlib import Path

import pytest

import dynamo_worker
from dynamo_core.engine import Engine
from dynamo_core.testing import EngineConformance
from dynamo_worker._sglang.engine import SglangEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

MODEL = Path(dynamo_worker.__file__).parent / "models" / "tinylm"
ARGUMENTS = '{"mem_fraction_static": 0.2, "page_size": 16, "enable_deterministic_inference": true}'


class TestRealSglang(EngineConformance):
    factory = SglangEngine
    patience_s = 300.0

    def make_engine(self) -> Engine:
        return SglangEngine.from_args(["--model", str(MODEL), "--sglang-args", ARGUMENTS])
