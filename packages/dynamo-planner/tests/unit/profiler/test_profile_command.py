"""The profiler against a real HTTP server and against the simulated engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from dynamo_core.errors import ConfigurationError
from dynamo_planner._cli import main
from dynamo_planner._measured import ProfileTiming
from dynamo_planner._profiler.page import curves_chart
from dynamo_planner._profiler.sweep import Measurement, Sweep, SweepPlan


class CompletionServer:
    """A small OpenAI-compatible endpoint in a thread of its own, with two tokens a chunk, so that usage counts."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer_status = 200
        self.events: list[str] | None = None
        self.fail_after: int | None = None
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> CompletionServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        runner = self._loop.run_until_complete(self._start())
        self._loop.call_soon(self._started.set)
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = cast("tuple[str, int]", runner.addresses[0])[1]
        return runner

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("authorization"))
        failing = self.fail_after is not None and len(self.requests) > self.fail_after
        if failing or self.answer_status != 200:
            return web.Response(status=503 if failing else self.answer_status, text="no worker is ready")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in self.events if self.events is not None else _events(body["max_tokens"]):
            await response.write(f"data: {event}\n\n".encode())
        return response


def _events(tokens: int) -> Iterator[str]:
    for _ in range(tokens // 2):
        yield json.dumps({"choices": [{"index": 0, "text": "ab"}]})
    yield json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})
    yield "[DONE]"


@pytest.fixture
def server() -> Iterator[CompletionServer]:
    with CompletionServer() as running:
        yield running


def options(server: CompletionServer, folder: Path, *more: str) -> list[str]:
    sizes = ["--isl", "8,16", "--concurrency", "1,3", "--osl", "6"]
    return ["profile", "--url", server.url, "--model", "m", *sizes, "--out", str(folder), *more]


def test_a_live_endpoint_is_swept_and_the_profile_plans(
    server: CompletionServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    folder = tmp_path / "profile"
    assert main(options(server, folder, "--api-key-file", str(key))) == 0
    assert sorted(len(body["prompt"]) for body in server.requests) == [8] * 5 + [16] * 4
    assert set(server.keys) == {"Bearer secret"}
    assert len({tuple(body["prompt"]) for body in server.requests}) == 9
    assert all(body["ignore_eos"] and body["stream"] for body in server.requests)
    profile = json.loads((folder / "profile.json").read_text())
    assert profile["schema"] == "dynamo.engine_profile.v1"
    assert len(profile["points"]) == 4
    assert all(point["ttft_ms"] > 0 and point["output_tokens_s"] > 0 for point in profile["points"])
    timing = ProfileTiming.load(folder)
    assert timing.prefill_s(12) > 0
    captured = capsys.readouterr()
    assert "4/4" in captured.err
    assert "report" in captured.out
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page


def test_a_sweep_that_was_cut_off_goes_on_after_its_points(server: CompletionServer, tmp_path: Path) -> None:
    server.fail_after = 5
    assert main(options(server, tmp_path)) == 2
    server.fail_after = None
    # A process that was killed may leave half a line.
    with (tmp_path / "points.jsonl").open("ab") as lines:
        lines.write(b'{"isl": 16, "conc')
    before = len(server.requests)
    assert main(options(server, tmp_path)) == 0
    assert [len(body["prompt"]) for body in server.requests[before:]] == [16] * 5
    before = len(server.requests)
    assert main(options(server, tmp_path)) == 0
    assert len(server.requests) == before
    assert main(options(server, tmp_path, "--restart")) == 0
    assert len(server.requests) == before + 9


def test_another_sweep_in_the_folder_is_refused(
    server: CompletionServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(server, tmp_path)) == 0
    assert main(options(server, tmp_path, "--seed", "4")) == 2
    assert "--restart" in capsys.readouterr().err
    (tmp_path / "points.jsonl").write_text("nonsense\n")
    assert main(options(server, tmp_path)) == 2
    assert "is no sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "events", "told"),
    [
        (503, None, "answered 503: no worker is ready"),
        (200, [], "without a token"),
        (200, ["nonsense"], "no JSON object"),
        (200, ['{"error": {"message": "out of memory"}}'], "out of memory"),
    ],
)
def test_what_the_endpoint_does_wrong_is_named(
    server: CompletionServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: int,
    events: list[str] | None,
    told: str,
) -> None:
    server.answer_status, server.events = status, events
    assert main(options(server, tmp_path)) == 2
    assert told in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CompletionServer() as gone:
        arguments = options(gone, tmp_path)
    assert main(arguments) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_the_simulated_engine_is_profiled_as_its_step_times_say(tmp_path: Path) -> None:
    assert main(["profile", "--mock", "--isl", "512,1024", "--concurrency", "1,8", "--out", str(tmp_path)]) == 0
    points = {
        (point["isl"], point["concurrency"]): point
        for point in json.loads((tmp_path / "profile.json").read_text())["points"]
    }
    assert points[1024, 1]["ttft_ms"] > points[512, 1]["ttft_ms"]
    assert points[512, 8]["ttft_ms"] > points[512, 1]["ttft_ms"]
    assert points[512, 8]["itl_ms"] > points[512, 1]["itl_ms"]
    assert points[512, 8]["output_tokens_s"] > 3 * points[512, 1]["output_tokens_s"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--isl", "a"], "--isl"),
        (["--isl", "0"], "at least 1"),
        (["--osl", "1"], "at least 2"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], told: str
) -> None:
    assert main(["profile", "--mock", "--out", str(tmp_path), *wrong]) == 2
    assert told in capsys.readouterr().err


def test_a_model_is_needed_and_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--url", "http://x", "--out", str(tmp_path)]) == 2
    assert "--model" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["profile", "--mock", "--out", str(blocked / "profile")]) == 2
    assert "cannot be written" in capsys.readouterr().err


async def test_a_cancelled_sweep_keeps_its_points(tmp_path: Path) -> None:
    plan = SweepPlan("engine", (8, 16), (1,), osl=4)
    reached = asyncio.Event()

    async def measure(isl: int, concurrency: int) -> Measurement:
        if isl == 16:
            reached.set()
            await asyncio.Event().wait()
        return Measurement(isl, concurrency, 1.0, 1.0, 1.0)

    task = asyncio.create_task(Sweep(plan, tmp_path).run(measure, lambda done, total, point: None))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "points.jsonl").read_text().count("\n") == 2


def test_a_plan_without_points_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        SweepPlan("engine", (), (1,))


def test_a_chart_of_one_point_has_a_place_for_it() -> None:
    assert "<circle" in curves_chart({"one": [(4.0, 2.0)]})
