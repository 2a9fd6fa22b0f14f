"""The public surface."""

import dynamo_frontend


def test_all_is_sorted_and_importable():
    assert dynamo_frontend.__all__ == sorted(dynamo_frontend.__all__)
    for name in dynamo_frontend.__all__:
        assert getattr(dynamo_frontend, name) is not None


def test_unknown_names_are_attribute_errors():
    assert not hasattr(dynamo_frontend, "nonesuch")
