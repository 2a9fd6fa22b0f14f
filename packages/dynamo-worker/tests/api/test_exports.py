import inspect

import dynamo_worker


def test_all_is_sorted_and_complete() -> None:
    assert dynamo_worker.__all__ == sorted(dynamo_worker.__all__)
    for name in dynamo_worker.__all__:
        assert getattr(dynamo_worker, name) is not None


def test_every_public_name_is_exported() -> None:
    public = {
        name
        for name, value in vars(dynamo_worker).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("dynamo_worker")
    }
    public = {name for name in public if not name.startswith("_")}
    assert public
    assert public <= set(dynamo_worker.__all__)
