import dynamo_kvbm


def test_all_is_sorted_and_equals_the_public_names() -> None:
    public = {name for name in vars(dynamo_kvbm) if not name.startswith("_")}
    assert list(dynamo_kvbm.__all__) == sorted(dynamo_kvbm.__all__)
    assert public == set(dynamo_kvbm.__all__)
