import pytest

import dynamo_planner


def test_all_is_sorted_and_importable() -> None:
    assert list(dynamo_planner.__all__) == sorted(dynamo_planner.__all__)
    for name in dynamo_planner.__all__:
        assert getattr(dynamo_planner, name).__module__.startswith("dynamo_planner.")


def test_nothing_else_is_public() -> None:
    public = {name for name in vars(dynamo_planner) if not name.startswith("_")}
    assert public - set(dynamo_planner.__all__) <= {"TYPE_CHECKING", "Any"}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = dynamo_planner.Nothing
