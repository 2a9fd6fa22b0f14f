"""What a request through the gateway costs its caller."""

import pytest

from dynamo_core.errors import RateLimitedError
from dynamo_core.testing import FakeClock
from dynamo_frontend._access.access import Caller
from dynamo_frontend._access.keys import ApiKey
from dynamo_frontend._gateway.charge import Charge
from dynamo_frontend._http.request import HttpRequest

LIMIT = 1000


def request(body=b'{"max_tokens": 100}', limit=LIMIT):
    key = ApiKey("id", "digest", tokens_per_minute=limit)
    return HttpRequest("POST", "/v1/chat/completions", body=body, caller=Caller(key, "", FakeClock(), 1.0))


def left(found):
    return int(found.caller.headers()["x-ratelimit-remaining-tokens"])


@pytest.mark.parametrize(
    ("pieces", "used"),
    [
        ([b'{"usage": {"prompt_tokens": 3, "total_tokens": 40}}'], 40),
        (
            [b'data: {"usage":{"total_tokens":7}}\n\n', b'data: {"usage":{"total', b'_tokens":9}}\n\ndata: [DONE]\n\n'],
            9,
        ),
        ([b'{"usage":{"input_tokens":10,"output_tokens":20}}'], 30),
        ([b"data: {}\n\n" * 5], 4 + 5),
    ],
)
def test_the_engines_own_count_is_what_is_used(pieces, used):
    found = request()
    charge = Charge.of(found)
    assert left(found) == LIMIT - 4 - 100
    for piece in pieces:
        charge.feed(piece)
    charge.settle(answered=True)
    charge.settle(answered=True)
    assert left(found) == LIMIT - used


def test_a_refused_request_costs_nothing():
    found = request()
    Charge.of(found).settle(answered=False)
    assert left(found) == LIMIT


@pytest.mark.parametrize(
    ("body", "reserved"),
    [
        (b"{}", 256),
        (b"nonsense", 2 + 256),
        (b'{"max_completion_tokens": 9, "n": 3}', 9 + 27),
        (b'{"max_tokens":"x"}', 260),
    ],
)
def test_what_is_set_aside(body, reserved):
    found = request(body)
    assert Charge.of(found) is not None
    assert left(found) == LIMIT - reserved


def test_too_much_is_refused_and_callers_without_a_limit_are_free():
    found = request(b'{"max_tokens": 900}')
    Charge.of(found)
    with pytest.raises(RateLimitedError):
        Charge.of(found)
    assert Charge.of(request(limit=0)) is None
    assert Charge.of(HttpRequest("POST", "/")) is None
