"""How fast the tiers of this machine are, beside what its memory and its disk do at most."""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockDescriptor, BlockStore
from dynamo_kvbm._tiers.disk import DiskTier
from dynamo_kvbm._tiers.host import HostTier
from dynamo_kvbm._tiers.object_store import ObjectTier
from dynamo_kvbm._tiers.slot_file import aligned_bytes

BATCH_BLOCKS = 16


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    Attributes:
        block_bytes: Size of every block.
        blocks: Blocks written and read in each run.
        runs: Measured runs, after one that warms up.
        disk: Folder on the disk to measure; None for none.
        object_url: Object store to measure; None for none.
    """

    block_bytes: int
    blocks: int
    runs: int
    disk: Path | None = None
    object_url: str | None = None


@dataclass(frozen=True)
class TierRate:
    """One direction of one tier.

    Attributes:
        tier: Which tier.
        operation: ``put`` or ``get``.
        gb_per_s: Median over the runs.
        min_gb_per_s: Slowest run.
        max_gb_per_s: Fastest run.
        batch_us: Median time of a call with ``BATCH_BLOCKS`` blocks.
        limit: What it is compared with, empty for nothing.
        limit_gb_per_s: What that reached in the same runs, None for nothing.
    """

    tier: str
    operation: str
    gb_per_s: float
    min_gb_per_s: float
    max_gb_per_s: float
    batch_us: float
    limit: str = ""
    limit_gb_per_s: float | None = None


def bench(plan: BenchPlan, clock: Clock) -> list[TierRate]:
    """Measure the host tier and what else the plan names.

    Raises:
        ConfigurationError: if a folder or store cannot be used.
    """
    rates = _host(plan, clock)
    if plan.disk is not None:
        rates += _disk(plan, plan.disk, clock)
    if plan.object_url is not None:
        rates += _object(plan, plan.object_url, clock)
    return rates


def bench_table(rates: Sequence[TierRate]) -> str:
    """Return the rates as text: a row a direction."""
    lines = [f"{'tier':<10}{'':<5}{'GB/s':>8}{'min':>8}{'max':>8}{'us/call':>10}  {'limit':<18}{'GB/s':>8}{'share':>8}"]
    for rate in rates:
        line = f"{rate.tier:<10}{rate.operation:<5}{rate.gb_per_s:>8.2f}{rate.min_gb_per_s:>8.2f}"
        line += f"{rate.max_gb_per_s:>8.2f}{rate.batch_us:>10,.0f}"
        if rate.limit_gb_per_s:
            share = 100 * rate.gb_per_s / rate.limit_gb_per_s
            line += f"  {rate.limit:<18}{rate.limit_gb_per_s:>8.2f}{share:>7.0f}%"
        lines.append(line)
    return "\n".join(lines)


def _host(plan: BenchPlan, clock: Clock) -> list[TierRate]:
    tier = HostTier(plan.blocks, plan.block_bytes)
    target = np.zeros((plan.blocks, plan.block_bytes), dtype=np.uint8)
    data = _data(plan)

    def copy(first: int, count: int) -> None:
        for i in range(first, first + count):
            target[i] = np.frombuffer(data, dtype=np.uint8)

    def lend(hashes: Sequence[int]) -> None:
        with tier.borrow(hashes) as views:
            for i, view in enumerate(views):
                target[i] = np.frombuffer(view, dtype=np.uint8)

    limits: list[list[float]] = []

    def limit() -> None:
        limits.append(_times(plan, clock, copy))

    put, get = _rounds(plan, clock, tier, lend, limit)
    tier.close()
    both = (limits, limits)
    return [_rate(plan, "host", "put", put, "memcpy", both[0]), _rate(plan, "host", "get", get, "memcpy", both[1])]


def _disk(plan: BenchPlan, folder: Path, clock: Clock) -> list[TierRate]:
    with _scratch(folder) as scratch, _raw_file(scratch / "raw", plan) as (write, read):
        tier = DiskTier(scratch / "tier", plan.blocks, plan.block_bytes)
        writes: list[list[float]] = []
        reads: list[list[float]] = []

        def limit() -> None:
            writes.append(_times(plan, clock, write))
            reads.append(_times(plan, clock, read))

        put, get = _rounds(plan, clock, tier, lambda hashes: _require_whole(tier, hashes), limit)
        tier.close()
    name = "O_DIRECT, in order"
    return [_rate(plan, "disk", "put", put, name, writes), _rate(plan, "disk", "get", get, name, reads)]


def _object(plan: BenchPlan, url: str, clock: Clock) -> list[TierRate]:
    tier = ObjectTier(url, plan.blocks, fingerprint=f"bench {os.getpid()}")
    try:
        put, get = _rounds(plan, clock, tier, lambda hashes: _require_whole(tier, hashes), lambda: None)
    finally:
        tier.remove(list(range(1, (plan.runs + 1) * plan.blocks + 1)))
        tier.close()
    return [_rate(plan, "object", "put", put), _rate(plan, "object", "get", get)]


def _rounds(
    plan: BenchPlan,
    clock: Clock,
    store: BlockStore,
    read: Callable[[Sequence[int]], None],
    limit: Callable[[], None],
) -> tuple[list[list[float]], list[list[float]]]:
    """Return the times of each call of each run: puts, gets. Whatever it is compared with runs in between."""
    data = _data(plan)
    numbers = itertools.count(1)
    puts: list[list[float]] = []
    gets: list[list[float]] = []
    for _ in range(plan.runs + 1):
        hashes = [next(numbers) for _ in range(plan.blocks)]

        def put(first: int, count: int, hashes: Sequence[int] = hashes) -> None:
            blocks = [BlockDescriptor(item) for item in hashes[first : first + count]]
            store.put(blocks, [data] * len(blocks))

        def get(first: int, count: int, hashes: Sequence[int] = hashes) -> None:
            read(hashes[first : first + count])

        puts.append(_times(plan, clock, put))
        gets.append(_times(plan, clock, get))
        limit()
    return puts, gets


def _times(plan: BenchPlan, clock: Clock, call: Callable[[int, int], None]) -> list[float]:
    times: list[float] = []
    for first in range(0, plan.blocks, BATCH_BLOCKS):
        started = clock.monotonic()
        call(first, min(BATCH_BLOCKS, plan.blocks - first))
        times.append(clock.monotonic() - started)
    return times


def _rate(
    plan: BenchPlan,
    tier: str,
    operation: str,
    runs: Sequence[Sequence[float]],
    limit: str = "",
    limit_runs: Sequence[Sequence[float]] = (),
) -> TierRate:
    """Summarise runs; the first one warmed up."""
    size = plan.blocks * plan.block_bytes / 1e9
    rates = [size / max(sum(times), 1e-9) for times in runs[1:]]
    limits = [size / max(sum(times), 1e-9) for times in limit_runs[1:]]
    batch_us = 1e6 * statistics.median(time for times in runs[1:] for time in times)
    reached = statistics.median(limits) if limits else None
    return TierRate(tier, operation, statistics.median(rates), min(rates), max(rates), batch_us, limit, reached)


def _require_whole(store: BlockStore, hashes: Sequence[int]) -> None:
    if None in store.get(hashes):
        raise ConfigurationError(f"tier {store.tier.value} lost a block under way; it has too little room, or fails")


def _data(plan: BenchPlan) -> memoryview:
    data = aligned_bytes(plan.block_bytes)
    data[:] = np.random.default_rng(1).integers(0, 256, plan.block_bytes, dtype=np.uint8)
    return data.data


@contextmanager
def _scratch(folder: Path) -> Generator[Path]:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".dynamo-kvbm-bench-") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise ConfigurationError(f"--disk {folder}: {error.strerror or error}; give a writable folder") from error


@contextmanager
def _raw_file(path: Path, plan: BenchPlan) -> Generator[tuple[Callable[[int, int], None], Callable[[int, int], None]]]:
    """Yield plain writing and reading of blocks in order, past the page cache where the file system can."""
    size = plan.block_bytes
    buffer = mmap.mmap(-1, size)
    buffer[:] = _data(plan)
    flags = os.O_RDWR | os.O_CREAT
    direct = os.O_DIRECT if size % mmap.PAGESIZE == 0 else 0
    try:
        descriptor = os.open(path, flags | direct, 0o600)
    except OSError:
        descriptor = os.open(path, flags, 0o600)
    os.posix_fallocate(descriptor, 0, plan.blocks * size)

    def write(first: int, count: int) -> None:
        for i in range(first, first + count):
            os.pwrite(descriptor, buffer, i * size)

    def read(first: int, count: int) -> None:
        for i in range(first, first + count):
            os.preadv(descriptor, [buffer], i * size)

    try:
        yield write, read
    finally:
        os.close(descriptor)
