"""The frontend: CPU of a short chat and of a streamed token, latency, memory of open streams, and the gateway.

The server has one core to itself where the machine has two; engines and load share the rest, and only the server's own
CPU time counts. The engine plays at full speed, where it hands out as many tokens at once as it likes, and for
``frontend_event`` so slowly that each token is an event of its own. ``frontend_resumable_event`` has as its limit what
an event costs that nobody can come back for, ``frontend_kserve_request`` what a chat costs. Rivals run the same load in
the same way: the published ai-dynamo frontend before its own mocker, and the LiteLLM proxy before the same trivial
engine.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import dynamo_worker
from dynamo_tools.bench import Options, frontend_load
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.http_servers import (
    Place,
    ServerError,
    cpu_seconds,
    free_port,
    generated_tokens,
    load,
    process,
    resident_mib,
    upstream,
    wait_for_model,
)
from dynamo_tools.bench.rivals import Rival, install

_TINYLM = Path(dynamo_worker.__file__).parent / "models" / "tinylm"
_MODEL = "bench"
_OVERRIDES = "certifi>=2024.2.2\naisimulate; sys_platform == 'never'\n"
_LITELLM_ENV = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}
_TOKENS = 256
_STREAMS = 64
_FULL_SPEED = ("--speedup-ratio", "inf")
_RIVAL_FULL_SPEED = ("--speedup-ratio", "1000000")
# About 2 ms a step: longer than any engine here needs to hand out one token of each stream.
_PACED = ("--speedup-ratio", "3")
# About a second a step: streams come in and stay, and none ends while others still come.
_DROWSY = (
    *("--decode-speedup-ratio", "0.01", "--max-num-seqs", "16384"),
    *("--total-kv-blocks", "65536", "--max-num-batched-tokens", "1000000"),
)


@dataclass(frozen=True)
class Server:
    """A server under measurement."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Side:
    """Values of one side by figure, one a run."""

    values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, figure: str, value: float) -> None:
        """Note a run."""
        self.values.setdefault(figure, []).append(value)

    def median(self, figure: str) -> float | None:
        """Median of a figure; None if it was not measured."""
        found = self.values.get(figure)
        return statistics.median(found) if found else None


def run(options: Options) -> list[Figure]:
    """Measure everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, theirs, litellm = Side(), Side(), Side()
        with _frontend(folder, _FULL_SPEED) as server:
            _measure(server, ours, "frontend", options)
            _measure_requests(server, ours, "frontend_kserve_request", options, mode="kserve")
        with _frontend(folder, _PACED) as server:
            _measure_streams(server, ours, "frontend_event", options)
            _measure_streams(server, ours, "frontend_resumable_event", options, mode="resumable")
        with upstream(_MODEL, folder) as engine, _gateway(folder, engine) as server:
            _measure(server, ours, "gateway", options)
        _open_streams(folder, ours, options)
        lasting = frontend_load.figures(partial(_frontend, folder), _FULL_SPEED, _MODEL, options)
        _rival("ai-dynamo", lambda: _measure_dynamo(folder, theirs, options))
        _rival("litellm", lambda: _measure_litellm(folder, litellm, options))
    return [*_figures(ours, theirs, litellm), *lasting]


def _figures(ours: Side, theirs: Side, litellm: Side) -> list[Figure]:
    table = (
        ("frontend_request", "ms CPU", theirs, "ai-dynamo frontend", 0.15),
        ("frontend_token", "us CPU", theirs, "ai-dynamo frontend", 3.5),
        ("frontend_event", "us CPU", theirs, "ai-dynamo frontend", None),
        ("frontend_resumable_event", "us CPU", None, None, ours.median("frontend_event")),
        ("frontend_kserve_request", "ms CPU", None, None, ours.median("frontend_request")),
        ("frontend_p50", "ms", theirs, "ai-dynamo frontend", 0.75),
        ("frontend_p99", "ms", theirs, "ai-dynamo frontend", None),
        ("frontend_open_streams", "MiB", theirs, "ai-dynamo frontend", 600.0),
        ("gateway_request", "ms CPU", litellm, "litellm proxy", 0.10),
        ("gateway_token", "us CPU", litellm, "litellm proxy", 6.0),
        ("gateway_p50", "ms", litellm, "litellm proxy", None),
    )
    return [
        Figure.of(
            name,
            ours.values[name],
            unit=unit,
            better="lower",
            rival=rival,
            rival_value=side.median(name) if side is not None else None,
            limit_value=limit,
        )
        for name, unit, side, rival, limit in table
    ]


def _measure(server: Server, side: Side, prefix: str, options: Options, *, slow: bool = False) -> None:
    """Measure requests, streamed tokens and latency of one server; one that is slow gets a tenth of the work."""
    requests = _measure_requests(server, side, f"{prefix}_request", options, slow=slow)
    _measure_streams(server, side, f"{prefix}_token", options, slow=slow)
    with load(server.url, _MODEL, "requests", 1, 4) as generator:
        generator.send(requests // 4)
        for _ in range(options.runs):
            seen = generator.send(requests // 4)
            side.add(f"{prefix}_p50", seen["p50_ms"])
            side.add(f"{prefix}_p99", seen["p99_ms"])


def _measure_requests(
    server: Server, side: Side, figure: str, options: Options, *, slow: bool = False, mode: str = "requests"
) -> int:
    """Measure short requests that are answered whole; return how many a run sends."""
    requests = (400 if options.quick else 4000) // (10 if slow else 1)
    with load(server.url, _MODEL, mode, 32, 4) as generator:
        generator.send(requests)
        for _ in range(options.runs):
            cpu, seen = _cpu(server, lambda: generator.send(requests))
            side.add(figure, cpu / seen["requests"] * 1e3)
    return requests


def _measure_streams(
    server: Server, side: Side, figure: str, options: Options, *, slow: bool = False, mode: str = "stream"
) -> None:
    concurrency = 8 if slow else _STREAMS
    streams = concurrency * (1 if options.quick else 4)
    tokens = generated_tokens(server.port, _MODEL, _TOKENS)
    with load(server.url, _MODEL, mode, concurrency, _TOKENS) as generator:
        generator.send(streams)
        for _ in range(options.runs):
            cpu, seen = _cpu(server, lambda: generator.send(streams))
            side.add(figure, cpu / (seen["requests"] * tokens) * 1e6)


def _cpu(server: Server, work: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
    before = cpu_seconds(server.pid)
    seen = work()
    return cpu_seconds(server.pid) - before, seen


def _open_streams(folder: Path, side: Side, options: Options) -> None:
    """Memory of a frontend that holds open streams, each past its first token, over that of an idle one."""
    streams = 1000 if options.quick else 10_000
    with _frontend(folder, _DROWSY) as server:
        before = resident_mib(server.pid)
        with load(server.url, _MODEL, "hold", streams, 512) as generator:
            generator.line()
            held = resident_mib(server.pid)
    side.add("frontend_open_streams", before + (held - before) * 10_000 / streams)


@contextlib.contextmanager
def _frontend(
    folder: Path, engine: tuple[str, ...], options: tuple[str, ...] = (), count: int = 1, **others: tuple[str, ...]
) -> Generator[Server, None, None]:
    place, port = Place.here(), free_port()
    discovery = tempfile.mkdtemp(dir=folder)
    planes = ["--discovery", f"file://{discovery}", "--log-level", "warning"]
    ours = [sys.executable, "-m", "dynamo_runtime"]
    roomy = ["--engine-request-limit", "20000", "--request-queue-limit", "20000"]
    worker = [*ours, "worker", *planes, "--engine", "mock", "--model", str(_TINYLM), *roomy, "--model-name"]
    front = [*ours, "frontend", *planes, "--router", "round-robin", "--http-port", str(port), *options]
    engines = [*[(_MODEL, engine)] * count, *others.items()]
    with contextlib.ExitStack() as running:
        children = [
            running.enter_context(process([*worker, name, *given], place.others, folder)) for name, given in engines
        ]
        child = running.enter_context(process(front, place.server, folder))
        for name in (_MODEL, *others):
            wait_for_model(port, name, [child, *children])
        yield Server(port, child.pid)


@contextlib.contextmanager
def _gateway(folder: Path, engine: str) -> Generator[Server, None, None]:
    port = free_port()
    argv = [sys.executable, "-m", "dynamo_frontend", "serve", "--upstream", engine, "--http-port", str(port)]
    with process(argv, Place.here().server, folder) as child:
        wait_for_model(port, _MODEL, [child])
        yield Server(port, child.pid)


def _rival(name: str, work: Callable[[], None]) -> None:
    try:
        work()
    except (ServerError, ProcessLookupError) as error:
        print(f"bench: {name} failed, its values are null where it had none yet: {error}", file=sys.stderr)


def _install(name: str, requirement: str, options: Options) -> Path | None:
    """Install a rival without the requirements that no index has."""
    options.cache.mkdir(parents=True, exist_ok=True)
    overrides = options.cache / "overrides.txt"
    overrides.write_text(_OVERRIDES, encoding="utf-8")
    return install(Rival(name, (requirement, "--override", str(overrides))), options.cache)


def _measure_dynamo(folder: Path, side: Side, options: Options) -> None:
    python = _install("ai-dynamo", "ai-dynamo==1.6.1", options)
    if python is None:
        return
    place, port = Place.here(), free_port()
    env = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": tempfile.mkdtemp(dir=folder),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_LOG": "warn",
        "HF_HUB_OFFLINE": "1",
    }
    mocker = [str(python), "-m", "dynamo.mocker", "--model-path", str(_TINYLM), "--model-name", _MODEL]
    front = [str(python), "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    front += ["--router-mode", "round-robin"]
    for pace in (_RIVAL_FULL_SPEED, _PACED):
        engine = process([*mocker, *pace], place.others, folder, env)
        with engine as back, process(front, place.server, folder, env) as child:
            wait_for_model(port, _MODEL, [child, back])
            server = Server(port, child.pid)
            if pace is _PACED:
                _measure_streams(server, side, "frontend_event", options)
            else:
                _measure(server, side, "frontend", options)


def _measure_litellm(folder: Path, side: Side, options: Options) -> None:
    python = _install("litellm", "litellm[proxy]==1.106.10", options)
    if python is None:
        return
    port = free_port()
    with upstream(_MODEL, folder) as engine:
        config = folder / "litellm.yaml"
        config.write_text(
            f"model_list:\n- model_name: {_MODEL}\n  litellm_params:\n    model: openai/{_MODEL}\n"
            f"    api_base: {engine}/v1\n    api_key: none\n",
            encoding="utf-8",
        )
        argv = [str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        argv += ["--num_workers", "1", "--telemetry", "False"]
        with process(argv, Place.here().server, folder, _LITELLM_ENV) as child:
            wait_for_model(port, _MODEL, [child])
            _measure(Server(port, child.pid), side, "gateway", options, slow=True)
