"""The router's choices in virtual time: conversations in a closed loop, and a recorded trace.

The closed loop is 64 conversations of 6 turns behind 8 system prompts, 32 requests in flight, on workers with the
timing curves of the rival's mock engine. Its rival's values are reference numbers, measured with ai-dynamo 1.6.1's own
frontend and mock engine in real time, not in this run; its limit is what one worker with room for everything hits. The
rival's rule is tried in this run too: policy ``kv`` is its documented cost, on the same workers and requests. Halfway
through, the router is replaced by one that begins with the first one's index, and by one that begins with nothing.

The trace is Mooncake's conversation trace, 12,031 requests in an hour, which is read from
``.bench-cache/conversation.jsonl.gz`` if it is there. The rival is the best other policy of this package, in this run;
each other policy is compared on the same requests as well, with the 95 % interval of resampled requests as spread.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from dynamo_core import plugins
from dynamo_router._lab_replay import OpenLoop, Replay, ReplayedRequest
from dynamo_router._lab_sessions import Sessions, SessionShape
from dynamo_router._lab_stats import FIGURES, percentile
from dynamo_router._lab_trace import MOONCAKE_BLOCK_SIZE, TraceRequest, read_trace, scale_rate
from dynamo_router._lab_worker import WorkerModel
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure

DEFAULT_POLICY = "ttft"
RIVAL_POLICY = "kv"
_SESSION_FLEETS = {16: (1024, 59.0), 4: (4096, 65.8)}
_SESSION_GOALS = {16: 70.0, 4: 75.0}
_ALL_BLOCKS = 65_536
_TRACE = "conversation.jsonl.gz"
_TRACE_WORKERS = 8
_TRACE_RATES = (1.0, 1.3)
_TRACE_FIGURES = ("ttft_mean", "ttft_p99")
_REPLAY_LIMIT_S = 20.0
# One needs requests that name their worker; without sessions and promises, the others choose as the default does.
_NOT_COMPARED = {"direct", "session-affinity", "slo"}
_EVENT_DELAY_S = 0.002


def sessions(options: Options) -> list[Figure]:
    """Return hit rates and times to first token of the closed loop."""
    seeds = range(1 if options.quick else options.runs)
    figures: list[Figure] = []
    ceiling = statistics.median(_hit_percent(_converse(DEFAULT_POLICY, 1, _ALL_BLOCKS, seed)) for seed in seeds)
    for workers, (blocks, rival_hits) in _SESSION_FLEETS.items():
        ours = [_converse(DEFAULT_POLICY, workers, blocks, seed) for seed in seeds]
        turns = [_converse("round-robin", workers, blocks, seed) for seed in seeds]
        theirs = [_converse(RIVAL_POLICY, workers, blocks, seed) for seed in seeds]
        figures.append(
            Figure.of(
                f"router_sessions_{workers}_hits",
                [_hit_percent(found) for found in ours],
                unit="%",
                better="higher",
                rival="ai-dynamo 1.6.1 kv (reference)",
                rival_value=rival_hits,
                limit_value=ceiling,
            )
        )
        figures.append(
            Figure.of(
                f"router_sessions_{workers}_hits_same_run",
                [_hit_percent(found) for found in ours],
                unit="%",
                better="higher",
                rival="its cost formula",
                rival_value=statistics.median(map(_hit_percent, theirs)),
                limit_value=_SESSION_GOALS[workers],
            )
        )
        figures.append(
            Figure.of(
                f"router_sessions_{workers}_ttft_p50",
                [_first_token_ms(found) for found in ours],
                unit="ms",
                better="lower",
                rival="round-robin",
                rival_value=statistics.median(map(_first_token_ms, turns)),
                limit_value=statistics.median(map(_first_token_ms, theirs)),
            )
        )
    return figures


def replaced(options: Options) -> list[Figure]:
    """Return the points of hit rate that are lost when a router is replaced halfway through the closed loop."""
    lost: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(1 if options.quick else options.runs):
        kept = _converse(DEFAULT_POLICY, 16, _SESSION_FLEETS[16][0], seed)
        half = len(kept) // 2
        for warm, found in lost.items():
            after = _converse(DEFAULT_POLICY, 16, _SESSION_FLEETS[16][0], seed, replace_after=half, warm=warm)
            found.append(_hit_percent(kept[half:]) - _hit_percent(after[half:]))
    return [
        Figure.of(
            "router_replaced_hits_lost",
            lost[True],
            unit="points",
            better="lower",
            rival="a cold start",
            rival_value=statistics.median(lost[False]),
            limit_value=2.0,
        )
    ]


def trace(options: Options) -> list[Figure]:
    """Return the default policy's times on the trace beside the best other policy's, and the pace of a replay."""
    path = options.cache / _TRACE
    if not path.is_file():
        print(f"bench: there is no {path}, the trace is not replayed", file=sys.stderr)
        return []
    recorded = read_trace(path, limit=1000 if options.quick else None)
    figures: list[Figure] = []
    paces: list[float] = []
    for rate in _TRACE_RATES:
        requests = scale_rate(recorded, rate)
        started = time.process_time()
        ours = [_replay(DEFAULT_POLICY, requests, seed) for seed in range(1 if options.quick else 3)]
        paces.append((time.process_time() - started) / len(ours))
        others = {name: _replay(name, requests, 0) for name in _other_policies()}
        figures += [_compared(figure, rate, ours, others) for figure in _TRACE_FIGURES]
        figures += _changes(rate, ours[0], others, resamples=20 if options.quick else 200)
    replays = Figure.of("router_replay", paces, unit="CPU s", better="lower", limit_value=_REPLAY_LIMIT_S)
    return [*figures, replays]


def _compared(
    figure: str, rate: float, ours: Sequence[list[ReplayedRequest]], others: dict[str, list[ReplayedRequest]]
) -> Figure:
    best = min(others, key=lambda name: FIGURES[figure](others[name]))
    return Figure.of(
        f"router_trace_{rate:g}x_{figure}",
        [FIGURES[figure](found) for found in ours],
        unit="s",
        better="lower",
        rival=best,
        rival_value=FIGURES[figure](others[best]),
    )


def _changes(
    rate: float, ours: Sequence[ReplayedRequest], others: dict[str, list[ReplayedRequest]], *, resamples: int
) -> list[Figure]:
    """Compare the default policy with each other one on the same requests, resampled alike for all."""
    rng = random.Random(0)
    drawn: dict[tuple[str, str], list[float]] = {}
    for _ in range(resamples):
        chosen = rng.choices(range(len(ours)), k=len(ours))
        mine = [ours[number] for number in chosen]
        base = {figure: FIGURES[figure](mine) for figure in _TRACE_FIGURES}
        for name, found in others.items():
            theirs = [found[number] for number in chosen]
            for figure in _TRACE_FIGURES:
                drawn.setdefault((figure, name), []).append(100 * (base[figure] / FIGURES[figure](theirs) - 1))
    return [
        Figure(
            figure=f"router_trace_{rate:g}x_{figure}_against_{name}",
            value=100 * (FIGURES[figure](ours) / FIGURES[figure](others[name]) - 1),
            unit="%",
            better="lower",
            rival=name,
            rival_value=0.0,
            limit_value=None,
            runs=resamples,
            min=percentile(values, 0.025),
            max=percentile(values, 0.975),
        )
        for (figure, name), values in sorted(drawn.items())
    ]


def _other_policies() -> list[str]:
    return sorted(plugins.available("policies").keys() - _NOT_COMPARED - {DEFAULT_POLICY})


def _converse(policy: str, workers: int, blocks: int, seed: int, **router: Any) -> list[ReplayedRequest]:
    model = WorkerModel(
        prefill_tokens_per_s=1000.0 / 1.518344e-02,
        prefill_square_s=4.209989e-10,
        overhead_s=16.50142e-3,
        decode_occupancy_s=(5.74e-3, 54.01e-3, -25.74e-3),
        kv_blocks=blocks,
    )
    fleet: dict[str, Any] = {"workers": workers, "model": model, "block_size": 16, "view_delay_s": _EVENT_DELAY_S}
    replay = Replay(policy, {}, **fleet, seed=seed, **router)
    return replay.run(Sessions(SessionShape(), block_size=16, seed=seed))


def _replay(policy: str, requests: Sequence[TraceRequest], seed: int) -> list[ReplayedRequest]:
    replay = Replay(policy, {}, workers=_TRACE_WORKERS, model=WorkerModel(), block_size=MOONCAKE_BLOCK_SIZE, seed=seed)
    return replay.run(OpenLoop(requests))


def _first_token_ms(found: Sequence[ReplayedRequest]) -> float:
    return 1000 * FIGURES["ttft_p50"](found)


def _hit_percent(found: Sequence[ReplayedRequest]) -> float:
    return 100 * FIGURES["hit_rate"](found)
