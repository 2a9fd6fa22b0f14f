"""The public surface."""

import dynamo_worker


def test_all_is_sorted_and_importable() -> None:
    assert dynamo_worker.__all__ == sorted(dynamo_worker.__all__)
    for name in dynamo_worker.__all__:
        assert getattr(dynamo_worker, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(dynamo_worker, "nonesuch")
