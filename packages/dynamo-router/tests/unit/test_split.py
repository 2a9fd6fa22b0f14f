from __future__ import annotations

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.errors import CapacityExhaustedError, ConfigurationError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ReportedLoad
from dynamo_core.routing import RequestOutcome, RoutingRequest
from dynamo_core.testing import FakeClock
from dynamo_core.tokens import pack_tokens
from dynamo_router import KvRouter, RouterSettings
from dynamo_router._split import SplitOptions, read_split_options, select_split

DECODE, PREFILL = WorkerId(1), WorkerId(2)
PROMPT = list(range(400))


def pool(worker, **settings):
    router = KvRouter(block_size=4, policy="kv", clock=FakeClock(), settings=RouterSettings(**settings))
    router.upsert_worker(worker, ModelCard("m", kv_block_size=4))
    return router


@pytest.fixture
def decode():
    router = pool(DECODE)
    router.report_load(DECODE, ReportedLoad(kv_used_blocks=1, kv_total_blocks=10))
    return router


@pytest.fixture
def prefill():
    return pool(PREFILL)


def ask(extra=0, **fields):
    return RoutingRequest("r", token_ids=pack_tokens(PROMPT + [7] * extra), **fields)


async def warm(decode):
    """Let the decode worker have computed the prompt."""
    done = await decode.select(ask())
    decode.first_token(done.reservation)
    return done


def booked(router):
    return sum(load.projected.active_requests for load in router.loads())


async def test_every_request_is_split_unless_told_otherwise(prefill, decode):
    await warm(decode)
    found = await select_split(prefill, decode, ask(), SplitOptions())
    assert (found.prefill.worker, found.decode.worker) == (PREFILL, DECODE)
    (load,) = prefill.loads()
    assert (load.projected.prefill_tokens, load.projected.decode_blocks) == (400, 0)
    assert decode.loads()[0].projected.prefill_tokens == 0


@pytest.mark.parametrize(
    ("extra", "options", "local"),
    [
        (100, {}, True),
        (100, {"eff_isl_threshold": 100}, False),
        (100, {"eff_isl_ratio_threshold": 0.2}, False),
        (99, {"eff_isl_threshold": 100}, True),
        (100, {"policy": "prefill_load"}, False),
        (100, {"policy": "always"}, False),
        (100, {"eff_isl_threshold": 0, "policy": "isl_or_load"}, False),
    ],
)
async def test_a_short_rest_stays_on_the_decode_worker(prefill, decode, extra, options, local):
    await warm(decode)
    settings = read_split_options({"policy": "isl_bounding", **options})
    found = await select_split(prefill, decode, ask(extra), settings)
    assert (found.prefill is None) is local
    assert booked(prefill) == (0 if local else 1)
    assert decode.loads()[0].projected.prefill_tokens == (extra if local else 0)


@pytest.mark.parametrize("policy", ["prefill_load", "isl_or_load"])
async def test_busy_prefill_workers_are_spared(prefill, decode, policy):
    settings = SplitOptions(policy=policy, eff_isl_threshold=0, prefill_busy_tokens=400)
    first = await select_split(prefill, decode, ask(), settings)
    assert first.prefill is not None
    busier = await select_split(prefill, decode, RoutingRequest("s", token_ids=pack_tokens(range(900, 910))), settings)
    assert busier.prefill is not None, "as many as the limit are not beyond it"
    found = await select_split(prefill, decode, ask(1), settings)
    assert found.prefill is None
    assert "410 tokens to compute" in found.reason


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (ReportedLoad(kv_used_blocks=10, kv_total_blocks=10), "uses 1.00"),
        (ReportedLoad(), "does not report"),
    ],
)
async def test_a_decode_worker_that_is_or_may_be_busy_is_spared(prefill, decode, report, reason):
    await warm(decode)
    decode.report_load(DECODE, report)
    found = await select_split(prefill, decode, ask(), SplitOptions(policy="isl_bounding"))
    assert found.prefill is not None
    assert reason in found.reason


async def test_asking_books_nothing(prefill, decode):
    for policy in ("always", "isl_bounding"):
        await select_split(prefill, decode, ask(reserve=False), SplitOptions(policy=policy))
    assert (booked(prefill), booked(decode)) == (0, 0)


async def test_half_a_booking_does_not_stay(prefill):
    decode = pool(DECODE, max_reservations=1)
    held = await decode.select(ask())
    with pytest.raises(CapacityExhaustedError):
        await select_split(prefill, decode, ask(), SplitOptions())
    assert booked(prefill) == 0
    decode.complete(held.reservation, RequestOutcome(held.decision_id))
    await select_split(prefill, decode, ask(), SplitOptions())
    assert (booked(prefill), booked(decode)) == (1, 1)


def test_options_are_checked():
    with pytest.raises(ConfigurationError, match="it takes: policy, eff_isl_threshold"):
        read_split_options({"limit": 1})
    with pytest.raises(ConfigurationError, match="eff_isl_ratio"):
        read_split_options({"eff_isl_ratio_threshold": 2})
