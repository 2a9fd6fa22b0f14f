import dynamo_router


def test_exports_are_sorted_and_complete():
    public = sorted(name for name in vars(dynamo_router) if not name.startswith("_"))
    assert dynamo_router.__all__ == sorted(dynamo_router.__all__)
    assert set(dynamo_router.__all__) <= set(public)
    for name in dynamo_router.__all__:
        assert getattr(dynamo_router, name).__module__.startswith("dynamo_router.")
