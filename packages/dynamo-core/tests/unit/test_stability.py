"""Stability markers warn as they say."""

import warnings

import pytest

from dynamo_core.stability import beta, deprecated, experimental, stability_of


def plain() -> int:
    return 1


@experimental
def trial(value: int) -> int:
    """Try it."""
    return value + 1


@beta
def almost() -> int:
    return 2


@deprecated(since="1.1", removed_in="2.0", use="new()")
def old() -> int:
    return 3


def test_experimental_warns_once() -> None:
    with pytest.warns(FutureWarning, match=r"trial is experimental"):
        assert trial(1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trial(2) == 3


def test_beta_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert almost() == 2


def test_deprecated_warns_each_time_with_the_replacement() -> None:
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match=r"old is deprecated since 1\.1 and goes in 2\.0; use new\(\)"):
            assert old() == 3


def test_markers_can_be_read_and_keep_the_docs() -> None:
    assert [stability_of(f) for f in (plain, trial, almost, old)] == ["stable", "experimental", "beta", "deprecated"]
    assert trial.__doc__ == "Try it."
    assert trial.__name__ == "trial"


def test_warning_points_at_the_caller() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        old()
    assert caught[0].filename == __file__


def test_classes_stay_classes() -> None:
    @experimental
    class Trial:
        size = 3

    assert isinstance(Trial, type)
    assert stability_of(Trial) == "experimental"
    with pytest.warns(FutureWarning, match="Trial is experimental"):
        assert isinstance(Trial(), Trial)
    assert Trial.size == 3
