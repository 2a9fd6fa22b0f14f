"""The sidecar passes the engine contract's own tests, in both forms in which servers give token ids."""

from collections.abc import AsyncIterator

import pytest
from fake_server import FakeServer

from dynamo_core.engine import Engine
from dynamo_core.testing import EngineConformance
from dynamo_worker._openai_http.engine import OpenAIHttpEngine


class TestTokenIds(EngineConformance):
    factory = OpenAIHttpEngine
    form = "token_ids"

    @pytest.fixture(autouse=True)
    async def _server(self) -> AsyncIterator[None]:
        self.server = await FakeServer(self.form).start()
        yield
        await self.server.close()

    def make_engine(self) -> Engine:
        return OpenAIHttpEngine.from_args(["--url", self.server.url, "--input", "tokens"])


class TestIdsInLogprobs(TestTokenIds):
    form = "logprobs"
