"""The reference engine passes the engine contract's own tests."""

from collections.abc import Sequence
from typing import Any

from parts import TINYLM
from tokenizers import Tokenizer

from dynamo_core import testing
from dynamo_core.engine import Engine
from dynamo_core.testing import EngineConformance
from dynamo_worker._reference.engine import ReferenceEngine

# The first release of core that this package works with has no suite for constraints yet.
WholeConformance: Any = getattr(testing, "GuidedEngineConformance", EngineConformance)


class TestReferenceEngine(WholeConformance):
    factory = ReferenceEngine
    tokenizer = Tokenizer.from_file(str(TINYLM / "tokenizer.json"))

    def text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids))

    def make_engine(self) -> Engine:
        return ReferenceEngine.from_args([])


class TestReferenceEngineUnderPressure(EngineConformance):
    """Few blocks, small steps: chunked prefill, preemption and eviction are at work in every test."""

    factory = ReferenceEngine

    def make_engine(self) -> Engine:
        small = ["--max-model-len", "512", "--block-size", "4", "--num-blocks", "128"]
        return ReferenceEngine.from_args([*small, "--max-num-batched-tokens", "5", "--max-num-seqs", "3"])
