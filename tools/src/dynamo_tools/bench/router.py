"""The router: index look-ups, event application, memory a block, whole decisions, and replayed policies.

The rival is the RadixTree of the published ai-dynamo-runtime wheel, on the same data in the same run: 1 M blocks in
sequences of 1,024 blocks over 64 workers, the first 16 blocks of each common to all, in events of 64 blocks.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dynamo_core import BlockHasher, ModelCard, WorkerId, pack_tokens
from dynamo_core.routing import RequestOutcome, RoutingRequest
from dynamo_router import KvRouter, RouterSettings
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.rivals import Rival, install
from dynamo_tools.bench.router_lab import replaced, sessions, trace
from dynamo_tools.process import clean_environment

_RIVAL = Rival("ai-dynamo-runtime", ("ai-dynamo-runtime==1.6.1",))
_PROGRAM = Path(__file__).with_name("router_index.py")
_DEPTHS = (16, 128, 1024)
_LIMITS = {"router_lookup_128": 8.0, "router_lookup_1024": 20.0, "router_apply": 1.5, "router_block_bytes": 200.0}


def run(options: Options) -> list[Figure]:
    """Measure everything."""
    ours = _index(Path(sys.executable), "ours", options)
    python = install(_RIVAL, options.cache)
    theirs = None if python is None else _index(python, "rival", options)
    figures = [_index_figure(name, unit, ours, theirs) for name, unit in _index_figures()]
    foreign = _index(Path(sys.executable), "foreign", options)
    assert foreign is not None
    for name, unit in (("router_apply", "M blocks/CPU s"), ("router_block_bytes", "bytes")):
        better = "higher" if name == "router_apply" else "lower"
        runs, limit = foreign[name], _LIMITS[name]
        figures.append(Figure.of(f"{name}_foreign", runs, unit=unit, better=better, limit_value=limit))
    return [*figures, *_decisions(options), *sessions(options), *replaced(options), *trace(options)]


def _index_figures() -> list[tuple[str, str]]:
    lookups = [(f"router_lookup_{depth}", "us") for depth in _DEPTHS]
    applied = [(name, "M blocks/CPU s") for name in ("router_apply", "router_churn")]
    applied.append(("router_apply_wall", "M blocks/s"))
    return [*lookups, *applied, ("router_block_bytes", "bytes")]


def _index_figure(
    name: str, unit: str, ours: dict[str, list[float]] | None, theirs: dict[str, list[float]] | None
) -> Figure:
    assert ours is not None
    return Figure.of(
        name,
        ours[name],
        unit=unit,
        better="higher" if name.startswith(("router_apply", "router_churn")) else "lower",
        rival="ai-dynamo-runtime RadixTree",
        rival_value=statistics.median(theirs[name]) if theirs else None,
        limit_value=_LIMITS.get(name),
    )


def _index(python: Path, side: str, options: Options) -> dict[str, list[float]] | None:
    """Run the index program in fresh processes, since memory is measured too."""
    blocks = 100_000 if options.quick else 1_000_000
    found: dict[str, list[float]] = {}
    for _ in range(1 if options.quick else 3):
        argv = [str(python), str(_PROGRAM), side, str(blocks)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=clean_environment())
        if done.returncode:
            print(f"bench: {side} index failed, its value is null: {done.stderr.strip()[-300:]}", file=sys.stderr)
            return None
        for name, value in json.loads(done.stdout).items():
            found.setdefault(name, []).append(value)
    return found


def _decisions(options: Options) -> list[Figure]:
    rounds = 300 if options.quick else 3000
    figures: list[Figure] = []
    for name, reserve in (("router_decision", False), ("router_decision_booked", True)):
        runs = [_decide(rounds, seed, reserve=reserve) for seed in range(options.runs)]
        for share, limit in ((0.50, 100.0), (0.99, 300.0)):
            walls, cpus = zip(*[(_percentile(wall, share), _percentile(cpu, share)) for wall, cpu in runs], strict=True)
            label = f"{name}_p{share * 100:.0f}"
            figures.append(Figure.of(label, walls, unit="us", better="lower", limit_value=limit))
            figures.append(Figure.of(f"{label}_cpu", cpus, unit="CPU us", better="lower", limit_value=limit))
    return figures


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


def _decide(rounds: int, seed: int, *, reserve: bool) -> tuple[list[float], list[float]]:
    """Time whole decisions, hashing included, for prompts of 8,192 tokens over 64 workers, receipts sampled out.

    Returns:
        Microseconds of each decision by the clock on the wall, and of CPU of this thread: on a machine that does
        something else too, only the second tells what a decision costs.
    """
    router = KvRouter(block_size=64, settings=RouterSettings(receipts="off"))
    for number in range(1, 65):
        router.upsert_worker(WorkerId(number), ModelCard("m", kv_block_size=64))
    rng = random.Random(seed)
    common = rng.choices(range(100_000), k=1024)
    prompts = [pack_tokens(common + rng.choices(range(100_000), k=7168)) for _ in range(256)]
    for prompt in prompts:
        asyncio.run(_route(router, prompt, reserve=True))

    async def measure() -> list[tuple[float, float]]:
        return [await _route(router, rng.choice(prompts), reserve=reserve) for _ in range(rounds)]

    gc.collect()
    walls, cpus = zip(*asyncio.run(measure()), strict=True)
    return list(walls), list(cpus)


async def _route(router: KvRouter, prompt: bytes, *, reserve: bool) -> tuple[float, float]:
    cpu, started = time.thread_time_ns(), time.perf_counter_ns()
    hashes = BlockHasher(64).hash_tokens(prompt)
    request = RoutingRequest(
        "r",
        prompt_tokens=8192,
        block_size=64,
        local_hashes=hashes.local,
        sequence_hashes=hashes.sequence,
        reserve=reserve,
    )
    decision = await router.select(request)
    elapsed = (time.perf_counter_ns() - started) / 1e3, (time.thread_time_ns() - cpu) / 1e3
    if decision.reservation is not None:
        router.first_token(decision.reservation)
        router.complete(decision.reservation, RequestOutcome(decision.decision_id))
    return elapsed
