"""A load that rises and falls before ``dynamo serve --planner``: what the planner does, drawn.

``uv run python -m dynamo_tools.bench.planner_ramp --out ramp.html`` starts the mock engine with one worker, raises the
load until four serve, lowers it until one is left, and writes load, workers and time to first token as one page. It
fails if a single request does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from dynamo_planner._lab.report import chart, page, table_of
from dynamo_tools.bench.http_servers import free_port, process, wait_for_model

MODEL = "tinylm"
MOST_WORKERS = 4
LOW_S, HIGH_S = 1.0, 16.0
REPLICA_REQUESTS_S = 5.0
RAMP_S = 8.0
PHASE_LIMIT_S = 90.0
SAMPLE_S = 0.25
OUTPUT_TOKENS = 8
SETTINGS = {
    "DYN_PLANNER_REQUESTS_PER_REPLICA_S": str(REPLICA_REQUESTS_S),
    "DYN_PLANNER_MAX_REPLICAS": str(MOST_WORKERS),
    "DYN_PLANNER_INTERVAL_S": "1",
    "DYN_PLANNER_THROUGHPUT_INTERVAL_S": "2",
    "DYN_PLANNER_LOAD_PREDICTOR": "moving-average",
    "DYN_PLANNER_SCALE_DOWN_DELAY_S": "4",
    "DYN_PLANNER_STALE_AFTER_S": "10",
    "DYN_FRONTEND_TRAFFIC_INTERVAL_S": "0.5",
}


@dataclass
class Ramp:
    """What was seen.

    Attributes:
        workers: Workers at each sample: seconds from the start, and how many.
        rates: Requests a second sent at each.
        ttft_ms: Time to first token of each request, by the second it was sent at.
        failures: What failed, in words.
    """

    workers: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    rates: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    ttft_ms: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    failures: list[str] = field(default_factory=list[str])

    @property
    def most(self) -> int:
        """Most workers seen."""
        return max(count for _, count in self.workers)

    @property
    def course(self) -> list[int]:
        """Numbers of workers in order, each change once."""
        counts = [count for _, count in self.workers]
        return [count for place, count in enumerate(counts) if not place or counts[place - 1] != count]


class Driver:
    """Sends an open-loop load and samples the workers.

    Args:
        url: Frontend.
        supervisor: Process whose children the workers are.
        ramp_s: Seconds in which the load rises, and falls.
    """

    def __init__(self, url: str, supervisor: int, ramp_s: float = RAMP_S) -> None:
        self._ramp_s = ramp_s
        self._url = f"{url}/v1/completions"
        self._supervisor = supervisor
        self._begun_s = time.monotonic()
        self._rate = LOW_S
        self._requests: set[asyncio.Task[None]] = set()
        self.ramp = Ramp()

    async def run(self) -> Ramp:
        """Raise the load until all workers serve, lower it until one is left.

        Raises:
            TimeoutError: if the planner does not follow.
        """
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            sending = asyncio.create_task(self._send(session))
            try:
                await self._go(LOW_S, HIGH_S, MOST_WORKERS)
                await self._go(HIGH_S, LOW_S, 1)
            finally:
                sending.cancel()
                await asyncio.gather(sending, *self._requests, return_exceptions=True)
        return self.ramp

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._begun_s

    async def _go(self, start: float, end: float, workers: int) -> None:
        begun_s = self._now_s
        async with asyncio.timeout(PHASE_LIMIT_S):
            while self._sample() != workers or self._now_s - begun_s < 2 * self._ramp_s:
                share = min(1.0, (self._now_s - begun_s) / self._ramp_s)
                self._rate = start + share * (end - start)
                await asyncio.sleep(SAMPLE_S)

    def _sample(self) -> int:
        count = workers_of(self._supervisor)
        self.ramp.workers.append((self._now_s, count))
        self.ramp.rates.append((self._now_s, self._rate))
        return count

    async def _send(self, session: aiohttp.ClientSession) -> None:
        while True:
            task = asyncio.create_task(self._request(session))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)
            await asyncio.sleep(1 / self._rate)

    async def _request(self, session: aiohttp.ClientSession) -> None:
        sent_s = self._now_s
        prompt = [5 + int(sent_s * 1000) % 200, 6, 7, 8]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "stream": True, "ignore_eos": True}
        try:
            async with session.post(self._url, json=body) as response:
                lines = [(self._now_s, line) async for line in response.content if line.startswith(b"data:")]
        except (aiohttp.ClientError, TimeoutError) as error:
            self.ramp.failures.append(repr(error))
            return
        if response.status != 200 or lines[-1][1].strip() != b"data: [DONE]" or b'"error"' in lines[-2][1]:
            self.ramp.failures.append(f"status {response.status}: {lines[-2:]}")
            return
        self.ramp.ttft_ms.append((sent_s, (lines[0][0] - sent_s) * 1000))


def workers_of(supervisor: int) -> int:
    """Return how many worker processes a supervisor has."""
    return sum(_is_worker(folder, supervisor) for folder in Path("/proc").iterdir() if folder.name.isdecimal())


def _is_worker(folder: Path, supervisor: int) -> bool:
    try:
        parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == supervisor and b"worker" in (folder / "cmdline").read_bytes().split(b"\0")[:6]
    except (FileNotFoundError, ProcessLookupError):
        return False


def drive(folder: Path, ramp_s: float = RAMP_S) -> Ramp:
    """Serve, drive the load, and return what was seen."""
    port = free_port()
    arguments = ["serve", "--engine", "mock", "--model", MODEL, "--workers", "1", "--planner", "--http-port", str(port)]
    command = [sys.executable, "-m", "dynamo_runtime", *arguments]
    with process(command, frozenset(os.sched_getaffinity(0)), folder, SETTINGS) as served:
        wait_for_model(port, MODEL, [served])
        return asyncio.run(Driver(f"http://127.0.0.1:{port}", served.pid, ramp_s).run())


def report(ramp: Ramp) -> str:
    """Return the page."""
    times = sorted(ramp.ttft_ms)
    middle = sorted(ms for _, ms in times)
    rows = [
        ("requests", str(len(times))),
        ("failed", str(len(ramp.failures))),
        ("workers", " → ".join(map(str, ramp.course))),
        ("time to first token, median", f"{_share(middle, 0.5):.1f} ms"),
        ("time to first token, 99th percentile", f"{_share(middle, 0.99):.1f} ms"),
    ]
    drawings = (
        ("Requests a second", {"sent": ramp.rates}),
        ("Workers", {"running": [(at_s, float(count)) for at_s, count in ramp.workers]}),
        ("Time to first token, ms", {"each request": times}),
    )
    body = table_of(("", ""), rows)
    for title, lines in drawings:
        columns = {name: ([x for x, _ in points], [y for _, y in points]) for name, points in lines.items()}
        body += f"<h2>{title}</h2>{chart(columns)}"
    return page("dynamo serve --planner under a load that rises and falls", body)


def _share(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def main() -> int:
    """Drive the ramp, write the page, and return 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("ramp.html"), help="page to write (default: ramp.html)")
    parser.add_argument(
        "--ramp-s", type=float, default=RAMP_S, help=f"seconds of rise and of fall (default: {RAMP_S:g})"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ramp = drive(Path(folder), options.ramp_s)
    options.out.write_text(report(ramp), encoding="utf-8")
    counts = {"requests": len(ramp.ttft_ms), "failed": len(ramp.failures), "workers": ramp.course}
    print(json.dumps({**counts, "failures": ramp.failures[:5], "page": str(options.out)}))
    return 1 if ramp.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
