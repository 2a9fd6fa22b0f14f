"""The error tree, its rules, and its round trip over the wire."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import (
    ERROR_TYPES,
    MAX_CAUSES,
    MAX_DIAGNOSTIC_BYTES,
    MIGRATABLE_REASONS,
    NEVER_MIGRATED_REASONS,
    CapacityExhaustedError,
    ConfigurationError,
    DynamoError,
    ErrorClass,
    ErrorRecord,
    InternalError,
    InvalidRequestError,
    RateLimitedError,
    UnavailableError,
    as_dynamo_error,
    error_from_record,
)
from dynamo_core.wire import ERROR_RECORD

STATUSES = {
    "invalid_request": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "conflict": 409,
    "payload_too_large": 413,
    "unsupported_media": 415,
    "rate_limited": 429,
    "cancelled": 499,
    "internal": 500,
    "not_implemented": 501,
    "backend_protocol": 502,
    "unavailable": 503,
    "deadline_exceeded": 504,
    "capacity_exhausted": 529,
    "configuration": 500,
}


def over_the_wire(error: DynamoError) -> DynamoError:
    return error_from_record(ERROR_RECORD.decode(ERROR_RECORD.encode(error.to_record())))


def linked(*errors: BaseException) -> DynamoError:
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    first = errors[0]
    assert isinstance(first, DynamoError)
    return first


def test_every_class_has_its_type_and_status() -> None:
    assert {kind.value: ERROR_TYPES[kind].http_status for kind in ERROR_TYPES} == STATUSES
    assert set(ErrorClass) - set(ERROR_TYPES) == {ErrorClass.UNKNOWN}


@pytest.mark.parametrize("kind", ERROR_TYPES.values())
def test_every_type_round_trips(kind: type[DynamoError]) -> None:
    error = over_the_wire(kind("what", param="p", retry_after_s=2.5, diagnostic="why"))
    assert type(error) is kind
    assert (error.message, error.reason, error.param, error.retry_after_s, error.diagnostic) == (
        "what",
        kind.default_reason,
        "p",
        2.5,
        "why",
    )
    assert str(error) == "what"


def test_overloaded_and_unavailable_differ() -> None:
    assert CapacityExhaustedError("x").http_status != UnavailableError("x").http_status


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(ERROR_TYPES.values())), st.text(), st.from_regex(r"[a-z0-9._-]{1,128}", fullmatch=True)
        ),
        min_size=1,
        max_size=MAX_CAUSES,
    )
)
def test_any_cause_chain_round_trips(chain: list[tuple[type[DynamoError], str, str]]) -> None:
    error = linked(*(kind(message, reason=reason) for kind, message, reason in chain))
    found = over_the_wire(error)
    assert [(type(e), str(e), e.reason) for e in found.chain() if isinstance(e, DynamoError)] == chain
    assert found.migratable == error.migratable


def test_long_chain_is_cut() -> None:
    error = linked(*(UnavailableError(f"{i}") for i in range(20)))
    assert [str(link) for link in over_the_wire(error).chain()] == [f"{i}" for i in range(MAX_CAUSES)]


def test_loop_in_a_chain_ends() -> None:
    one, two = UnavailableError("one"), UnavailableError("two")
    one.__cause__, two.__cause__ = two, one
    assert one.chain() == [one, two]
    assert len(one.to_record().causes) == 1


def test_foreign_cause_keeps_its_text_private() -> None:
    error = over_the_wire(linked(UnavailableError("lost"), OSError("socket 7")))
    cause = error.__cause__
    assert isinstance(cause, InternalError)
    assert cause.reason == "runtime.unclassified"
    assert "socket 7" in cause.diagnostic
    assert "socket 7" not in cause.message


def test_unknown_class_of_a_newer_peer_keeps_its_reason() -> None:
    error = error_from_record(ErrorRecord("teapot", "request.teapot", "short and stout"))
    assert type(error) is InternalError
    assert (error.reason, error.message) == ("request.teapot", "short and stout")


@pytest.mark.parametrize("reason", ["Upper.Case", "with space", "x" * 129, "ünïcode", "new\nline"])
def test_bad_reason_is_replaced_and_kept_for_logs(reason: str) -> None:
    error = InternalError("x", reason=reason, diagnostic="more")
    assert error.reason == "runtime.invalid_error"
    assert repr(reason) in error.diagnostic
    assert "more" in error.diagnostic


def test_diagnostic_is_cut_to_bytes_on_the_wire() -> None:
    record = InternalError("x", diagnostic="é" * MAX_DIAGNOSTIC_BYTES).to_record()
    assert len(record.diagnostic.encode()) <= MAX_DIAGNOSTIC_BYTES
    assert set(record.diagnostic) == {"é"}


def test_lone_surrogates_do_not_stop_an_error_from_travelling() -> None:
    error = over_the_wire(InternalError("bad \ud800 text", diagnostic="\ud800", param="\udfff"))
    assert error.message.startswith("bad ")


@pytest.mark.parametrize("reason", sorted(MIGRATABLE_REASONS))
def test_migratable_reasons(reason: str) -> None:
    assert UnavailableError("x", reason=reason).migratable


def test_other_reasons_are_not_migrated() -> None:
    assert not InvalidRequestError("x").migratable
    assert not InternalError("x").migratable
    assert not UnavailableError("x").migratable


@pytest.mark.parametrize("reason", sorted(NEVER_MIGRATED_REASONS))
def test_denied_reasons_win_anywhere_in_the_chain(reason: str) -> None:
    outer = UnavailableError("x", reason="backend.disconnected")
    assert not linked(outer, InternalError("y"), CapacityExhaustedError("z", reason=reason)).migratable


def test_only_the_outer_reason_allows_migration() -> None:
    assert not linked(InternalError("x"), UnavailableError("y", reason="backend.disconnected")).migratable


def test_retryable_types() -> None:
    retryable = {kind for kind in ERROR_TYPES.values() if kind.retryable}
    assert retryable == {RateLimitedError, UnavailableError, CapacityExhaustedError}


def test_typed_error_is_passed_on_as_it_is() -> None:
    error = ConfigurationError("x")
    assert as_dynamo_error(error) is error


def test_untyped_error_is_wrapped_without_showing_its_text() -> None:
    error = as_dynamo_error(ValueError("secret"))
    assert type(error) is InternalError
    assert "secret" not in error.message
    assert "ValueError: secret" in error.diagnostic
    assert isinstance(error.__cause__, ValueError)
