"""The frontend under lasting load: latency beside open streams, memory over many requests, stalls of the event loop."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager
from typing import Protocol

from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.http_servers import load, resident_mib

_BESIDE_STREAMS = 256
# About 20 ms a step: 256 streams of it are 12 800 events a second, from engines that do not step together.
_READING_ENGINES = 4
_READING_PACE = ("--speedup-ratio", "0.3", "--max-num-seqs", "512")
_LONG_PROMPT_WORDS = 40_000
_APART = ("--worker-component", "other")
_OTHER_MODEL = "other"
"""Model of a second engine, which answers at full speed while the first one paces its streams."""


class Running(Protocol):
    """A server that runs."""

    @property
    def port(self) -> int:
        """Where it listens."""
        ...

    @property
    def pid(self) -> int:
        """Its process."""
        ...

    @property
    def url(self) -> str:
        """Its base URL."""
        ...


class Launch(Protocol):
    """Starts a frontend before an engine, or before one engine for each of several models."""

    def __call__(
        self, engine: tuple[str, ...], options: tuple[str, ...] = (), count: int = 1, **others: tuple[str, ...]
    ) -> AbstractContextManager[Running]:
        """Start them: so many engines with some options, the frontend, and further engines by their model's name."""
        ...


def figures(launch: Launch, full_speed: tuple[str, ...], model: str, options: Options) -> list[Figure]:
    """Measure all figures of this module."""
    runs = range(options.runs)
    # The cache of tokenised text is full long before growth is measured; the quick form has a smaller one for that.
    cache = ("--tokenizer-cache-mb", "1" if options.quick else "64")
    with launch(full_speed, cache) as server:
        growth = [_growth(server, model, 5_000 if options.quick else 200_000)]
        stalls = [_stall(server, model) for _ in runs]
    with launch(_READING_PACE, count=_READING_ENGINES, **{_OTHER_MODEL: (*full_speed, *_APART)}) as server:
        beside = [_beside_streams(server, model) for _ in runs]
    return [
        Figure.of("frontend_p99_beside_256", beside, unit="ms", better="lower", limit_value=3.0),
        Figure.of("frontend_memory_growth", growth, unit="%", better="lower", limit_value=2.0),
        Figure.of("frontend_loop_stall", stalls, unit="ms", better="lower", limit_value=5.0),
    ]


def _beside_streams(server: Running, model: str) -> float:
    """Slowest hundredth of whole short chats while streams are open and every token of them is an event."""
    with load(server.url, model, "hold", _BESIDE_STREAMS, 4000) as streams:
        streams.line()
        with load(server.url, _OTHER_MODEL, "requests", 1, 4) as probe:
            probe.send(50)
            return float(probe.send(1000)["p99_ms"])


def _growth(server: Running, model: str, requests: int) -> float:
    """Resident memory after many requests with long prompts, all different, over that after a fifth of them."""
    with load(server.url, model, "long", 8, 300) as generator:
        generator.send(requests // 5)
        before = resident_mib(server.pid)
        generator.send(requests)
        return (resident_mib(server.pid) / before - 1) * 100


def _stall(server: Running, model: str) -> float:
    """How much longer the slowest small request takes beside very long prompts than the median one without."""
    with load(server.url, model, "live", 1, 0) as probe:
        probe.send(100)
        calm = statistics.median([float(probe.send(200)["p50_ms"]) for _ in range(3)])
        with load(server.url, model, "long", 1, _LONG_PROMPT_WORDS) as prompts:
            prompts.start(5)
            worst = float(probe.send(1500)["max_ms"])
            prompts.line()
    return max(0.0, worst - calm)
