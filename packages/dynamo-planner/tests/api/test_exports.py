import dynamo_planner


def test_all_is_sorted_and_equals_the_public_names() -> None:
    public = {name for name in vars(dynamo_planner) if not name.startswith("_")}
    assert list(dynamo_planner.__all__) == sorted(dynamo_planner.__all__)
    assert public == set(dynamo_planner.__all__)
