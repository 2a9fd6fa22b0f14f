"""The reference engine passes the engine contract's own tests."""

from dynamo_core.engine import Engine
from dynamo_core.testing import EngineConformance
from dynamo_worker._reference.engine import ReferenceEngine


class TestReferenceEngine(EngineConformance):
    factory = ReferenceEngine

    def make_engine(self) -> Engine:
        return ReferenceEngine.from_args([])


class TestReferenceEngineUnderPressure(EngineConformance):
    """Few blocks, small steps: chunked prefill, preemption and eviction are at work in every test."""

    factory = ReferenceEngine

    def make_engine(self) -> Engine:
        small = ["--max-model-len", "512", "--block-size", "4", "--num-blocks", "128"]
        return ReferenceEngine.from_args([*small, "--max-num-batched-tokens", "5", "--max-num-seqs", "3"])
