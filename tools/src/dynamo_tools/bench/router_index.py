"""Program of the router benchmark: builds an index, ours or the rival's, and prints its figures as JSON.

It runs in an environment that holds one of the two only: ``python router_index.py ours|foreign|rival BLOCKS``. Here
``foreign`` is ours with engines that name blocks by hashes of their own.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKERS = 64
SEQUENCE_BLOCKS = 1024
COMMON_BLOCKS = 16
EVENT_BLOCKS = 64
DEPTHS = (16, 128, 1024)
LOOKUPS = 2000
QUERIED_SEQUENCES = 256
CHURNED_SHARE = 4


@dataclass
class Side:
    """One index with its work, in the form it takes.

    Attributes:
        apply: Applies an event.
        lookup: Finds the holders of a prompt.
        events: Arguments of ``apply``.
        churn: The same once caches are full: each new chunk of blocks is followed by the eviction of as many old ones.
        churned_blocks: Blocks stored and blocks evicted in ``churn``, together.
        queries: Arguments of ``lookup`` by depth.
    """

    apply: Callable[..., object]
    lookup: Callable[[Any], object]
    events: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])
    churn: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])
    churned_blocks: int = 0
    queries: dict[int, list[Any]] = field(default_factory=lambda: {depth: list[Any]() for depth in DEPTHS})


def main() -> None:
    """Measure one side."""
    # Whole rounds of workers, so that a sequence and the one that later takes its room are on the same worker.
    count = max(int(sys.argv[2]) // SEQUENCE_BLOCKS // WORKERS, 2) * WORKERS
    side = _rival(count) if sys.argv[1] == "rival" else _ours(count, foreign=sys.argv[1] == "foreign")
    gc.collect()
    before = _resident_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    for event in side.events:
        side.apply(*event)
    # A side that applies in the background is done once it answers.
    side.lookup(side.queries[16][0])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    total = len(side.events) * EVENT_BLOCKS
    figures = {
        "router_apply": total / cpu / 1e6,
        "router_apply_wall": total / wall / 1e6,
        "router_block_bytes": (_resident_bytes() - before) / total,
    }
    rng = random.Random(3)
    for depth, queries in side.queries.items():
        figures[f"router_lookup_{depth}"] = _median_us(side.lookup, [rng.choice(queries) for _ in range(LOOKUPS)])
    cpu = time.process_time()
    for event in side.churn:
        side.apply(*event)
    side.lookup(side.queries[16][0])
    figures["router_churn"] = side.churned_blocks / (time.process_time() - cpu) / 1e6
    print(json.dumps(figures))


def _sequences(count: int) -> Iterator[tuple[int, list[int]]]:
    rng = random.Random(1)
    common = [rng.getrandbits(64) for _ in range(COMMON_BLOCKS)]
    for number in range(count):
        yield number, common + [rng.getrandbits(64) for _ in range(SEQUENCE_BLOCKS - COMMON_BLOCKS)]


def _ours(count: int, *, foreign: bool = False) -> Side:
    from dynamo_core.events import BlockRemoved, BlockStored
    from dynamo_core.ids import WorkerId
    from dynamo_core.tokens import chain_hashes, pack_hashes, unpack_hashes
    from dynamo_router._index import BlockIndex

    index, rng = BlockIndex(), random.Random(2)
    side = Side(index.apply, index.match)

    def chunks(number: int, local: list[int]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        chain = chain_hashes(local)
        names = [rng.getrandbits(64) for _ in chain] if foreign else chain
        if number < QUERIED_SEQUENCES:
            for depth, queries in side.queries.items():
                queries.append(unpack_hashes(pack_hashes(chain[:depth])))
        worker = WorkerId(number % WORKERS + 1)
        stored = [
            BlockStored(number, pack_hashes(names[first:stop]), pack_hashes(local[first:stop]), parent)
            for first, stop, parent in _cuts(names)
        ]
        removed = [BlockRemoved(number, pack_hashes(gone)) for gone in _evictions(names)]
        return [(worker, event) for event in stored], [(worker, event) for event in removed]

    return _filled(side, count, chunks)


def _cuts(names: list[int]) -> Iterator[tuple[int, int, int | None]]:
    for first in range(0, SEQUENCE_BLOCKS, EVENT_BLOCKS):
        yield first, first + EVENT_BLOCKS, names[first - 1] if first else None


def _evictions(names: list[int]) -> Iterator[list[int]]:
    """Yield what a full cache evicts of a sequence, its end first; the common prefix stays in use."""
    for first in range(SEQUENCE_BLOCKS - EVENT_BLOCKS, -1, -EVENT_BLOCKS):
        yield names[max(first, COMMON_BLOCKS) : first + EVENT_BLOCKS][::-1]


def _filled(
    side: Side, count: int, chunks: Callable[[int, list[int]], tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]
) -> Side:
    old: list[list[tuple[Any, ...]]] = []
    for number, local in _sequences(count + count // CHURNED_SHARE):
        stored, removed = chunks(number, local)
        if number < count:
            side.events += stored
            old.append(removed)
            continue
        for new, gone in zip(stored, old[number - count], strict=True):
            side.churn += [new, gone]
        side.churned_blocks += 2 * SEQUENCE_BLOCKS - COMMON_BLOCKS
    return side


def _rival(count: int) -> Side:
    from dynamo.llm import RadixTree  # pyright: ignore[reportMissingImports] - lives in the rival's environment only

    tree: Any = RadixTree()
    side = Side(tree.apply_event, tree.find_matches)
    rng = random.Random(2)

    def chunks(number: int, local: list[int]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        names = [rng.getrandbits(64) for _ in local]
        if number < QUERIED_SEQUENCES:
            for depth, queries in side.queries.items():
                queries.append(local[:depth])
        stored = [
            _rival_event(first + 1, parent, names[first:stop], local[first:stop])
            for first, stop, parent in _cuts(names)
        ]
        removed = [
            {"event_id": 1, "data": {"removed": {"block_hashes": gone}}, "dp_rank": 0} for gone in _evictions(names)
        ]
        worker = number % WORKERS
        return [(worker, json.dumps(event).encode()) for event in stored], [
            (worker, json.dumps(event).encode()) for event in removed
        ]

    return _filled(side, count, chunks)


def _rival_event(number: int, parent: int | None, names: list[int], local: list[int]) -> dict[str, Any]:
    blocks = [
        {"block_hash": name, "tokens_hash": content, "mm_extra_info": None}
        for name, content in zip(names, local, strict=True)
    ]
    return {"event_id": number, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}, "dp_rank": 0}


def _median_us(call: Callable[[Any], object], arguments: list[Any]) -> float:
    times: list[int] = []
    for argument in arguments:
        started = time.perf_counter_ns()
        call(argument)
        times.append(time.perf_counter_ns() - started)
    return sorted(times)[len(times) // 2] / 1e3


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


if __name__ == "__main__":
    main()
