from __future__ import annotations

from dynamo_core.planning import PoolState
from dynamo_runtime._supervisor.pool import DeviceAllocator, Phase, Pool
from dynamo_runtime._supervisor.spec import ProcessSpec


def pool_of(count: int) -> Pool:
    pool = Pool(ProcessSpec("worker", ("true",), count))
    for _ in range(count):
        pool.add(0.0)
    return pool


def test_a_replica_takes_the_lowest_free_name() -> None:
    pool = pool_of(3)
    pool.remove(pool.replicas[1])
    assert [replica.name for replica in pool.replicas] == ["worker-1", "worker-3"]
    assert pool.add(0.0).name == "worker-2"


def test_the_state_counts_phases_and_gives_the_median_start() -> None:
    pool = pool_of(4)
    for replica, at_s in zip(pool.replicas, (1.0, 2.0, 9.0), strict=False):
        pool.became_ready(replica, at_s)
    pool.replicas[2].leave(5.0)
    pool.replicas[3].phase = Phase.FAILED
    assert pool.state() == PoolState(ready=2, draining=1, desired=4, failed=1, startup_s=2.0)


def test_surplus_takes_failed_then_starting_then_the_newest() -> None:
    pool = pool_of(4)
    for replica in pool.replicas[:3]:
        pool.became_ready(replica, 1.0)
    pool.replicas[1].phase = Phase.FAILED
    pool.desired = 1
    assert [replica.name for replica in pool.surplus()] == ["worker-2", "worker-4", "worker-3"]


def test_a_pool_is_settled_once_all_were_ready_and_stays_so() -> None:
    pool = pool_of(2)
    pool.became_ready(pool.replicas[0], 1.0)
    assert not pool.settled
    pool.became_ready(pool.replicas[1], 1.0)
    pool.replicas[0].restart(5.0)
    assert pool.settled
    assert pool.state().ready == 1


def test_devices_are_handed_out_once_and_reused_after_release() -> None:
    devices = DeviceAllocator()
    first, second = devices.take(2), devices.take(1)
    assert (first, second) == ((0, 1), (2,))
    devices.release(first)
    assert devices.take(3) == (0, 1, 3)
    assert devices.take(0) == ()
