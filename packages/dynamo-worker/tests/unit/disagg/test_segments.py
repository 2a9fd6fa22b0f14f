from dynamo_worker._disagg.segments import SHARED_FOLDER, SegmentPool, is_shared, remove_abandoned


def test_a_living_pools_memory_stays_and_a_dead_ones_goes() -> None:
    pool = SegmentPool(4096, 1)
    segment = pool.take()
    assert segment is not None
    assert pool.take() is None, "one is the limit"
    dead = [SHARED_FOLDER / f"dynamo-kv-1-test{number}" for number in ("-0", "-1")]
    for path in dead:
        path.write_bytes(b"left")
    try:
        remove_abandoned()
        assert not any(path.exists() for path in dead)
        assert segment.path.exists()
        assert is_shared(pool.marker)
    finally:
        pool.give_back(segment, reusable=True)
        pool.close()
        pool.close()
    assert not segment.path.exists()
    assert not is_shared(pool.marker)
