from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import Observation
from dynamo_planner._sources.prometheus import PrometheusSource

DEADLINE_S = 40


class Frontend:
    """An exporter with the frontend's metrics, whose requests the test makes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = {"labelnames": ("model",), "registry": self.registry}
        self.requests = Counter("dynamo_frontend_requests", "", **names)  # type: ignore[arg-type] # options by name
        self.prompt = Histogram("dynamo_frontend_input_sequence_tokens", "", **names)  # type: ignore[arg-type] # as above
        self.output = Histogram("dynamo_frontend_output_sequence_tokens", "", **names)  # type: ignore[arg-type] # as above
        self.ttft = Histogram("dynamo_frontend_time_to_first_token_seconds", "", **names)  # type: ignore[arg-type] # as above
        self.serve(0)

    def serve(self, count: int) -> None:
        for _ in range(max(count, 1)):
            self.requests.labels("m").inc(min(count, 1))
            if count:
                self.prompt.labels("m").observe(1000)
                self.output.labels("m").observe(100)
                self.ttft.labels("m").observe(0.3)

    async def metrics(self, request: web.Request) -> web.Response:
        self.serve(5)
        return web.Response(body=generate_latest(self.registry))


async def serve(handler: object, path: str) -> tuple[web.AppRunner, int]:
    app = web.Application()
    app.router.add_get(path, handler)  # type: ignore[arg-type] # a handler of the test
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[str]:
    program = shutil.which("prometheus")
    assert program, "this test needs a real server: apt-get install prometheus"
    runner, exporter_port = await serve(Frontend().metrics, "/metrics")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: f, static_configs: [{{targets: ['127.0.0.1:{exporter_port}']}}]}}]\n"
    )
    process = await asyncio.create_subprocess_exec(
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    await process.wait()
    await runner.cleanup()


async def observed(source: PrometheusSource) -> Observation:
    """Ask until the server has scraped often enough, or the deadline passes."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            seen = await source.observe({})
            if seen.traffic and seen.traffic[0].requests and seen.traffic[0].ttft_s:
                return seen
            await SystemClock().sleep(0.2)


async def test_a_real_server_gives_rates_lengths_and_latencies(server: str) -> None:
    source = PrometheusSource(server, SystemClock(), window_s=10, model="m")
    seen = await observed(source)
    [traffic] = seen.traffic
    assert seen.stale == ()
    assert traffic.prompt_tokens / traffic.requests == pytest.approx(1000, rel=0.05)
    assert traffic.output_tokens / traffic.requests == pytest.approx(100, rel=0.05)
    assert all(0.25 <= value <= 0.5 for value in traffic.ttft_s)
    await source.close()
    other = PrometheusSource(server, SystemClock(), window_s=10, model="another")
    assert (await other.observe({})).stale == ("traffic",)
    await other.close()


@pytest.mark.parametrize("body", ["", "{}", '{"data": {"result": 5}}', "nonsense", '{"data": {"result": []}}'])
async def test_an_answer_without_a_result_is_missing_data(body: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        return web.Response(text=body)

    runner, port = await serve(answer, "/api/v1/query")
    source = PrometheusSource(f"http://127.0.0.1:{port}/", SystemClock(), window_s=10, token="secret")
    seen = await source.observe({})
    assert (seen.traffic, seen.stale) == ((), ("traffic",))
    await source.close()
    await source.close()
    await runner.cleanup()


async def test_values_that_are_no_numbers_are_missing_data() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"data": {"result": [{"metric": {"le": "x"}, "value": [0, "NaN"]}]}})

    runner, port = await serve(answer, "/api/v1/query")
    source = PrometheusSource(f"http://127.0.0.1:{port}", SystemClock(), window_s=10)
    assert (await source.observe({})).stale == ("traffic",)
    await source.close()
    await runner.cleanup()


async def test_a_server_that_is_away_is_missing_data_and_counted() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        source = PrometheusSource(f"http://127.0.0.1:{taken.getsockname()[1]}", SystemClock(), window_s=10)
        assert (await source.observe({})).stale == ("traffic",)
        assert source.lost_reports == 1
        await source.close()


def test_addresses_and_names_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--prometheus-url"):
        PrometheusSource("localhost:9090", SystemClock(), window_s=10)
    with pytest.raises(ConfigurationError, match="--prometheus-model"):
        PrometheusSource("http://x", SystemClock(), window_s=10, model='m"} or up')
