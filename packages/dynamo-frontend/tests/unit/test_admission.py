"""Busy thresholds."""

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ProjectedLoad, ReportedLoad, WorkerLoad
from dynamo_frontend._admission import MAX_OWN_THRESHOLDS, Admission, BusyThresholds


def load(used=0, total=100, prefill=0, decode=0):
    return WorkerLoad(
        WorkerId(1),
        ReportedLoad(kv_used_blocks=used, kv_total_blocks=total),
        ProjectedLoad(prefill_tokens=prefill, decode_blocks=decode),
    )


@pytest.mark.parametrize(
    ("thresholds", "found", "busy"),
    [
        (BusyThresholds(), load(used=100, prefill=10**6), False),
        (BusyThresholds(0.8), load(used=80), False),
        (BusyThresholds(0.8), load(used=81), True),
        (BusyThresholds(0.8), load(used=10, decode=81), True),
        (BusyThresholds(0.8), load(total=0, used=5), False),
        (BusyThresholds(0.8), WorkerLoad(WorkerId(1)), False),
        (BusyThresholds(None, 100), load(prefill=100), False),
        (BusyThresholds(None, 100), load(prefill=101), True),
    ],
)
def test_when_a_worker_is_busy(thresholds, found, busy):
    assert thresholds.busy(found) is busy


def test_all_busy_needs_workers():
    thresholds = BusyThresholds(0.5)
    assert not thresholds.all_busy([])
    assert not thresholds.all_busy([load(used=90), load(used=10)])
    assert thresholds.all_busy([load(used=90), load(used=60)])


async def test_busy_workers_refuse_with_529_until_the_threshold_is_lifted(stack):
    stack.say("fine")
    await stack.start(busy_prompt_tokens=1)
    operate = stack.context.admin_routes["busy_threshold"]
    model = stack.frontend._catalog.find("tiny")
    model.router.loads = lambda: [load(prefill=5)]
    reply = await stack.chat()
    assert (reply.status, reply.json["error"]["code"]) == (529, "capacity.pool_exhausted")
    assert reply.headers["retry-after"] == "1"
    shown = await operate({"model": "tiny"})
    assert shown["models"]["tiny"]["active_prefill_tokens_threshold"] is None
    assert (await stack.chat()).status == 200
    metrics = (await stack.get("/metrics")).body.decode()
    assert 'model_rejection_total{endpoint="chat_completions",model="tiny"} 1.0' in metrics


@pytest.mark.parametrize(
    "arguments",
    [{"nonsense": 1}, {"active_decode_blocks_threshold": 2}, {"active_prefill_tokens_threshold": 0}, {"model": 5}],
)
async def test_bad_thresholds_are_refused(stack, arguments):
    await stack.start(workers=0)
    with pytest.raises(InvalidRequestError):
        await stack.context.admin_routes["busy_threshold"](arguments)


async def test_thresholds_of_single_models_are_bounded_and_can_be_taken_back():
    admission = Admission(8, BusyThresholds(), SystemClock())
    for index in range(MAX_OWN_THRESHOLDS):
        await admission.operate({"model": f"m{index}", "active_prefill_tokens_threshold": 5})
    with pytest.raises(InvalidRequestError, match="reset"):
        await admission.operate({"model": "one more"})
    await admission.operate({"model": "m0", "active_prefill_tokens_threshold": 6})
    shown = await admission.operate({"model": "m1", "reset": True})
    assert "m1" not in shown["models"]
    await admission.operate({"model": "one more"})
