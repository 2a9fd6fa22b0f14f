"""Both sides of the vLLM connector, with real tiers, and records as vLLM's scheduler has them in vLLM's place."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from dynamo_core.clock import SystemClock
from dynamo_core.kv import BlockLayout
from dynamo_core.telemetry import Metrics
from dynamo_kvbm import create_connector
from dynamo_kvbm._vllm_connector.plan import Changes, Plan
from dynamo_kvbm._vllm_connector.scheduler_side import SchedulerSide
from dynamo_kvbm._vllm_connector.worker_side import WorkerSide

BLOCK_SIZE = 4
NUM_BLOCKS = 16


class Cache:
    """A device cache of bytes."""

    layout = BlockLayout(2, BLOCK_SIZE, 1, 8, "f32")

    def __init__(self) -> None:
        self.rows = np.zeros((NUM_BLOCKS, self.layout.block_bytes), dtype=np.uint8)

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        return [self.rows[index].tobytes() for index in block_ids]

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        for index, piece in zip(block_ids, data, strict=True):
            self.rows[index] = np.frombuffer(piece, dtype=np.uint8)


class Engine:
    """A scheduler and its workers, a step at a time."""

    def __init__(self, *, workers: int = 1, host_blocks: int = 8) -> None:
        self.scheduler = SchedulerSide(BLOCK_SIZE, workers)
        self.caches = [Cache() for _ in range(workers)]
        self.workers: list[WorkerSide] = []
        for cache in self.caches:
            options = {"host_blocks": host_blocks, "offload": "register"}
            side = WorkerSide(create_connector(options=options, clock=SystemClock(), metrics=Metrics()))
            side.bind(cache)  # type: ignore[arg-type] - bytes in the place of tensors
            self.workers.append(side)

    def run(self, request: Any, block_ids: list[int], *, computed: int = 0, fill: int = 0) -> int:
        """Schedule a whole prompt; return how many of its tokens were loaded."""
        matched = self.scheduler.match(request, computed)
        self.scheduler.allocated(request, block_ids, matched)
        request.num_computed_tokens = computed  # as vLLM: only once its blocks are allocated
        start = computed + matched
        new = SimpleNamespace(req_id=request.request_id, block_ids=(block_ids,), num_computed_tokens=start)
        self.step({request.request_id: len(request.all_token_ids) - start}, new=[new], fill=fill, first=start)
        return matched

    def step(self, scheduled: dict[str, int], *, new: Sequence[Any] = (), fill: int = 0, first: int = 0) -> Plan:
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set(), num_computed_tokens=[])
        output = SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=scheduled)
        plan = self.scheduler.plan(output)
        for worker, cache in zip(self.workers, self.caches, strict=True):
            worker.load(plan)
            for item in new:
                for index in item.block_ids[0][first // BLOCK_SIZE :]:
                    cache.rows[index] = fill + index
            worker.store(plan)
        found = [changes for worker in self.workers if (changes := worker.take_changes()) is not None]
        for changes in found:
            self.scheduler.apply(changes)
        return plan

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def request(name: str, tokens: Sequence[int], **rest: Any) -> Any:
    fields = {"lora_request": None, "cache_salt": None, "mm_features": [], "num_computed_tokens": 0, **rest}
    return SimpleNamespace(request_id=name, all_token_ids=list(tokens), num_tokens=len(tokens), **fields)


def test_blocks_come_back_byte_for_byte() -> None:
    engine = Engine()
    assert engine.run(request("a", range(18)), [0, 1, 2, 3, 4], fill=100) == 0
    assert engine.run(request("b", range(18)), [7, 8, 9, 10, 11]) == 16
    assert [engine.caches[0].rows[index][0] for index in (7, 8, 9, 10)] == [100, 101, 102, 103]
    assert engine.workers[0].take_failed() == set()
    engine.close()


def test_the_last_token_is_always_computed() -> None:
    engine = Engine()
    engine.run(request("a", range(16)), [0, 1, 2, 3])
    assert engine.scheduler.match(request("b", range(16)), 0) == 12
    assert engine.scheduler.match(request("c", range(16)), 8) == 4
    assert engine.scheduler.match(request("d", range(16)), 3) == 0
    engine.close()


def test_salts_adapters_and_pictures_keep_apart() -> None:
    engine = Engine()
    engine.run(request("a", range(16)), [0, 1, 2, 3])
    assert engine.scheduler.match(request("b", range(17), cache_salt="x"), 0) == 0
    assert engine.scheduler.match(request("c", range(17), lora_request=SimpleNamespace(lora_name="l")), 0) == 0
    assert engine.scheduler.match(request("d", range(17), mm_features=[object()]), 0) == 0
    assert engine.scheduler.match(request("e", range(17)), 0) == 16
    engine.close()


def test_what_the_tiers_drop_is_not_promised() -> None:
    engine = Engine(host_blocks=4)
    engine.run(request("a", range(16)), [0, 1, 2, 3])
    engine.run(request("b", range(100, 116)), [4, 5, 6, 7])
    assert engine.scheduler.match(request("c", range(17)), 0) < 16
    assert engine.scheduler.match(request("d", range(100, 117)), 0) == 16
    engine.close()


def test_a_load_that_fails_is_told() -> None:
    engine = Engine()
    engine.run(request("a", range(16)), [0, 1, 2, 3])
    engine.workers[0]._connector.clear()  # behind the scheduler's back
    assert engine.run(request("b", range(17)), [8, 9, 10, 11, 12]) == 16
    assert engine.workers[0].take_failed() == {8, 9, 10, 11}
    engine.close()


def test_a_block_counts_when_every_worker_has_it() -> None:
    scheduler = SchedulerSide(BLOCK_SIZE, 2)
    engine = Engine(workers=2)
    engine.run(request("a", range(8)), [0, 1])
    assert engine.scheduler.match(request("b", range(9)), 0) == 8
    held = request("c", range(9))
    name = scheduler._track(held).blocks(1)[0].sequence_hash
    scheduler.apply(Changes({name: 1}))
    assert scheduler.match(held, 0) == 0
    scheduler.apply(Changes({name: 1}).merged(Changes({name: 1})).merged(Changes({name: -1})))
    assert scheduler.match(held, 0) == 4
    engine.close()


def test_a_reset_empties_scheduler_and_workers() -> None:
    engine = Engine()
    engine.run(request("a", range(16)), [0, 1, 2, 3])
    engine.scheduler.clear()
    assert engine.scheduler.match(request("b", range(17)), 0) == 0
    assert engine.step({}).is_clear
    assert engine.run(request("c", range(17)), [4, 5, 6, 7, 8]) == 0
    assert engine.run(request("d", range(17)), [9, 10, 11, 12, 13]) == 16
    engine.close()


def test_a_block_that_comes_again_with_the_reset_is_known() -> None:
    engine = Engine()
    engine.run(request("a", range(16)), [0, 1, 2, 3])
    engine.scheduler.clear()
    assert engine.run(request("b", range(17)), [4, 5, 6, 7, 8]) == 0
    assert engine.run(request("c", range(17)), [9, 10, 11, 12, 13]) == 16
    engine.close()


def test_output_blocks_are_kept_as_they_fill() -> None:
    engine = Engine()
    running = request("a", range(7))
    engine.run(running, [0, 1])
    running.all_token_ids += [50, 51]
    cached = SimpleNamespace(req_ids=["a"], new_block_ids=[([2],)], resumed_req_ids=set(), num_computed_tokens=[7])
    output = SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={"a": 1})
    (store,) = engine.scheduler.plan(output).stores
    assert ([block.position for block in store.blocks], store.block_ids) == ([1], (1,))
    engine.scheduler.finished("a")
    assert not engine.scheduler._requests
    engine.close()
