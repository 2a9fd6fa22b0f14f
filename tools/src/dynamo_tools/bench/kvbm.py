"""What the block manager costs and gains: books, copies, disk, first tokens of an engine, hit rates."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm import BlockPool, DiskTier, HostTier
from dynamo_kvbm._lab.simulator import simulate
from dynamo_kvbm._lab.trace import read_trace
from dynamo_kvbm._tiers.shared_host import SharedHostTier
from dynamo_kvbm._tiers.slot_file import aligned_bytes
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.kvbm_engine import first_tokens
from dynamo_tools.bench.measure import repeat

_BATCH = 64
_MATCHED = 1024
_IO_BATCH = 16
_MIB = 1024**2
_TRACE = "packages/dynamo-kvbm/tests/data/mooncake_conversation_1500.jsonl.gz"
_SIMULATED_BLOCKS = 1000
_WHOLE_TRACE_BLOCKS = 3000
_POLICIES = ("lru", "arc", "s3fifo", "multi-lru", "hinted", "oracle")
# The same trace through another simulator, written apart from this one; the two should be within half a point.
_OTHER_REPLAY = {"lru": 6.5, "arc": 8.6, "s3fifo": 8.8}


def run(options: Options) -> list[Figure]:
    """Measure everything; disk figures need 1 GiB of room beside the workspace."""
    return [
        *_logical(options),
        *_host(options, "2mib", 2 * _MIB),
        *_host(options, "64kib", _MIB // 16),
        *_shared_host(options),
        *_disk(options),
        *_engine(options),
        *_hit_rates(options),
    ]


def _chain(first: int, count: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(first + i, 0, first + i - 1 if i else None, i) for i in range(count)]


def _logical(options: Options) -> list[Figure]:
    chains = [_chain(number * _BATCH + 1, _BATCH) for number in range(256 if options.quick else 2048)]
    total = len(chains) * _BATCH

    def cycle() -> float:
        pool = BlockPool(total // 4)
        started = time.process_time()
        for chain in chains:
            taken = pool.allocate(_BATCH)
            assert taken is not None
            taken.complete(chain).register().release()
        return total / (time.process_time() - started) / 1e3

    pool = BlockPool(_MATCHED)
    taken = pool.allocate(_MATCHED)
    assert taken is not None
    chain = _chain(1, _MATCHED)
    taken.complete(chain).register().release()
    hashes = [block.sequence_hash for block in chain]
    known = dict.fromkeys(hashes)
    match = repeat(lambda: _median_match_us(pool, hashes, 200), options.runs)
    floor = repeat(lambda: _median_us(lambda: list(map(known.get, hashes)), 200), options.runs)
    return [
        Figure.of(
            "kvbm_allocate_register_release",
            repeat(cycle, options.runs),
            unit="k blocks/CPU-s",
            better="higher",
            rival="the least that is asked",
            rival_value=500.0,
        ),
        Figure.of(
            "kvbm_match_1024",
            match,
            unit="us",
            better="lower",
            rival="1024 dict lookups",
            rival_value=statistics.median(floor),
        ),
    ]


def _median_us(call: Callable[[], object], calls: int) -> float:
    times: list[int] = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return statistics.median(times) / 1e3


def _median_match_us(pool: BlockPool, hashes: list[int], calls: int) -> float:
    times: list[int] = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        held = pool.match(hashes)
        times.append(time.perf_counter_ns() - started)
        held.release()
    return statistics.median(times) / 1e3


def _host(options: Options, name: str, size: int) -> list[Figure]:
    """Copies into and out of the host tier, each run beside plain copies of the same bytes in the same order."""
    count = 256 * _MIB // size
    pieces = [np.random.default_rng(i).bytes(size) for i in range(8)]
    target = np.ones((count, size), dtype=np.uint8)
    tier = HostTier(count, size)
    numbers = iter(range(1, 1 << 40))
    held: list[int] = []

    def plain() -> float:
        started = time.perf_counter()
        for i in range(count):
            target[i] = np.frombuffer(pieces[i % 8], dtype=np.uint8)
        return count * size / (time.perf_counter() - started) / 1e9

    def put() -> float:
        blocks = [BlockDescriptor(next(numbers)) for _ in range(count)]
        held[:] = [block.sequence_hash for block in blocks]
        started = time.perf_counter()
        for i in range(0, count, _IO_BATCH):
            tier.put(blocks[i : i + _IO_BATCH], [pieces[j % 8] for j in range(i, min(count, i + _IO_BATCH))])
        return count * size / (time.perf_counter() - started) / 1e9

    def lend() -> float:
        started = time.perf_counter()
        for i in range(0, count, _IO_BATCH):
            with tier.borrow(held[i : i + _IO_BATCH]) as views:
                for j, view in enumerate(views):
                    target[i + j] = np.frombuffer(view, dtype=np.uint8)
        return count * size / (time.perf_counter() - started) / 1e9

    for warm in (plain, put, lend):
        warm()
    rounds = [(put(), lend(), plain()) for _ in range(options.runs)]
    limit = statistics.median(row[2] for row in rounds)
    return [
        Figure.of(f"kvbm_host_put_{name}", [row[0] for row in rounds], unit="GB/s", better="higher", limit_value=limit),
        Figure.of(
            f"kvbm_host_lend_{name}", [row[1] for row in rounds], unit="GB/s", better="higher", limit_value=limit
        ),
    ]


def _shared_host(options: Options) -> list[Figure]:
    """The tier that processes share, with a lock between processes and books in shared memory."""
    size, count = 2 * _MIB, 128
    data = np.random.default_rng(1).bytes(size)
    target = np.ones((count, size), dtype=np.uint8)
    numbers = itertools.count(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dynamo-bench-") as folder:
        tier = SharedHostTier(Path(folder), count, size)

        def rates() -> tuple[float, float, float]:
            hashes = [next(numbers) for _ in range(count)]
            times = [time.perf_counter()]
            for i in range(0, count, _IO_BATCH):
                tier.put([BlockDescriptor(item) for item in hashes[i : i + _IO_BATCH]], [data] * _IO_BATCH)
            times.append(time.perf_counter())
            for i in range(0, count, _IO_BATCH):
                with tier.lend(hashes[i : i + _IO_BATCH]) as views:
                    for j, view in enumerate(views.values()):
                        target[i + j] = np.frombuffer(view, dtype=np.uint8)
            times.append(time.perf_counter())
            for i in range(count):
                target[i] = np.frombuffer(data, dtype=np.uint8)
            times.append(time.perf_counter())
            put, lend, plain = (count * size / (after - before) / 1e9 for before, after in itertools.pairwise(times))
            return put, lend, plain

        rates()
        rounds = [rates() for _ in range(options.runs)]
        tier.close()
    puts, lends, plain = zip(*rounds, strict=True)
    limit = statistics.median(plain)
    return [
        Figure.of("kvbm_shared_host_put_2mib", puts, unit="GB/s", better="higher", limit_value=limit),
        Figure.of("kvbm_shared_host_lend_2mib", lends, unit="GB/s", better="higher", limit_value=limit),
    ]


def _disk(options: Options) -> list[Figure]:
    """Disk tier beside sequential O_DIRECT transfers of the same size, one after the other, in the same run."""
    size, count = 2 * _MIB, 64 if options.quick else 192
    with tempfile.TemporaryDirectory(dir=options.root, prefix=".bench-disk-") as folder:
        tier = DiskTier(Path(folder) / "tier", count, size)
        numbers = iter(range(1, 1 << 40))
        data = aligned_bytes(size)  # as the write queue before a disk tier hands it over
        data[:] = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
        rounds = [
            (*_tier_rates(tier, numbers, data.data, count), *_raw_rates(Path(folder) / "raw", data.data, count))
            for _ in range(options.runs + 1)
        ][1:]  # the first run converts the preallocated extents of both
        tier.close()
        overhead = _index_percent(Path(folder) / "small", _MIB // 16)
    write, read, raw_write, raw_read = zip(*rounds, strict=True)
    return [
        Figure.of(
            "kvbm_disk_write_2mib",
            write,
            unit="GB/s",
            better="higher",
            limit_value=statistics.median(raw_write),
        ),
        Figure.of("kvbm_disk_read_2mib", read, unit="GB/s", better="higher", limit_value=statistics.median(raw_read)),
        Figure.of("kvbm_disk_index_overhead_64kib", [overhead], unit="% of data", better="lower", limit_value=1.0),
    ]


def _index_percent(folder: Path, size: int) -> float:
    """Return what a disk tier's index takes on disk, of what its data takes."""
    tier = DiskTier(folder, 256, size)
    tier.put([BlockDescriptor(1)], [bytes(size)])
    tier.close()
    index, data = (sum(path.stat().st_blocks for path in folder.glob(f"*.{kind}")) for kind in ("index", "data"))
    return 100 * index / data


def _tier_rates(tier: DiskTier, numbers: Iterator[int], data: memoryview, count: int) -> tuple[float, float]:
    blocks = [BlockDescriptor(next(numbers)) for _ in range(count)]
    started = time.perf_counter()
    for i in range(0, count, _IO_BATCH):
        tier.put(blocks[i : i + _IO_BATCH], [data] * _IO_BATCH)
    tier.sync()
    write_s = time.perf_counter() - started
    started = time.perf_counter()
    for i in range(0, count, _IO_BATCH):
        if None in tier.get([block.sequence_hash for block in blocks[i : i + _IO_BATCH]]):
            raise AssertionError("a block was lost; the figure would be of something else")
    total = count * len(data) / 1e9
    return total / write_s, total / (time.perf_counter() - started)


def _raw_rates(path: Path, data: memoryview, count: int) -> tuple[float, float]:
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, count * len(data))
        started = time.perf_counter()
        for i in range(count):
            os.pwrite(descriptor, buffer, i * len(data))
        os.fdatasync(descriptor)
        write_s = time.perf_counter() - started
        started = time.perf_counter()
        for i in range(count):
            os.preadv(descriptor, [buffer], i * len(data))
        read_s = time.perf_counter() - started
    finally:
        os.close(descriptor)
    total = count * len(data) / 1e9
    return total / write_s, total / read_s


def _engine(options: Options) -> list[Figure]:
    """Mean time to the first token of prompts that come again, with a working set of four times the device pool."""
    rounds = [asyncio.run(first_tokens()) for _ in range(3 if options.quick else 5)]
    if any(with_tier.outputs != without.outputs for with_tier, without in rounds):
        raise AssertionError("the host tier changed an answer")
    ours = [with_tier.mean_s * 1e3 for with_tier, _ in rounds]
    rival = statistics.median(without.mean_s * 1e3 for _, without in rounds)
    speedups = [without.mean_s / with_tier.mean_s for with_tier, without in rounds]
    return [
        Figure.of(
            "kvbm_first_token_speedup",
            speedups,
            unit="times",
            better="higher",
            rival="the least that is asked",
            rival_value=3.0,
        ),
        Figure.of(
            "kvbm_first_token_again",
            ours,
            unit="ms",
            better="lower",
            rival="the same engine without a host tier",
            rival_value=rival,
        ),
    ]


def _hit_rates(options: Options) -> list[Figure]:
    """Prefix hits on a recorded trace: the whole one if the cache folder has it, else the part beside the tests."""
    whole = options.cache / "mooncake_conversation_trace.jsonl.gz"
    path, blocks = (whole, _WHOLE_TRACE_BLOCKS) if whole.exists() else (options.root / _TRACE, _SIMULATED_BLOCKS)
    trace = read_trace(path)
    hits = {policy: simulate(trace, policy, blocks).hit_percent for policy in _POLICIES}
    other = _OTHER_REPLAY if path is whole else {}
    figures = [
        Figure.of(
            f"kvbm_hits_{policy}_{blocks}",
            [hits[policy]],
            unit="% of blocks",
            better="higher",
            rival="another simulator" if policy in other else "oracle",
            rival_value=other.get(policy, hits["oracle"]),
            limit_value=hits["oracle"],
        )
        for policy in _POLICIES[:-1]
    ]
    closed = 100 * (hits["hinted"] - hits["lru"]) / (hits["oracle"] - hits["lru"])
    name = f"kvbm_hints_close_gap_{blocks}"
    return [
        *figures,
        Figure.of(name, [closed], unit="% of lru to oracle", better="higher", rival="a third", rival_value=100 / 3),
    ]
