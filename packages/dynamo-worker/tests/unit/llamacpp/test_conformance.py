"""Core's suite on the llama.cpp engine, with real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_core.engine import Engine
from dynamo_core.testing import EngineConformance
from dynamo_worker._llamacpp.engine import LlamaCppEngine


class TestLlamaCppContract(EngineConformance):
    factory = LlamaCppEngine

    @pytest.fixture(autouse=True)
    def _model(self, gguf_file: Path) -> None:
        self._flags = ["--model", str(gguf_file), "--max-model-len", "1024", "--num-threads", "1"]

    def make_engine(self) -> Engine:
        return LlamaCppEngine.from_args(self._flags)

    # Greedy continuations pass; a sampled one draws anew.
    @pytest.mark.xfail(reason="llama.cpp's seeded generator counts draws, not positions", strict=False)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("accepted", [1, 3, 7])
    async def test_continuation_gives_the_rest(self, accepted: int, temperature: float) -> None:
        await super().test_continuation_gives_the_rest(accepted, temperature)

    @pytest.mark.parametrize("accepted", [1, 3, 7])
    async def test_a_greedy_continuation_gives_the_rest(self, accepted: int) -> None:
        await super().test_continuation_gives_the_rest(accepted, 0.0)
