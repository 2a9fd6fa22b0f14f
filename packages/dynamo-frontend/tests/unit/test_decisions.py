"""Receipts by id, as far as the router keeps any."""

from dynamo_core.enums import FinishReason
from dynamo_core.ids import WorkerId
from dynamo_core.routing import RequestOutcome, RoutingDecision

DECISION = RoutingDecision("abc-1/ö", "r-7", WorkerId(5), "kv", cached_tokens=32)
OUTCOME = RequestOutcome("abc-1/ö", FinishReason.EOS, prompt_tokens=40, ttft_s=0.5)


class Keeper:
    """A router that keeps one decision; the rest it leaves to another."""

    def __init__(self, router, outcome=None):
        self._router = router
        self._outcome = outcome

    def __getattr__(self, name):
        return getattr(self._router, name)

    def decision(self, decision_id):
        return (DECISION, self._outcome) if decision_id == DECISION.decision_id else None


def keep(stack, outcome=None):
    model = stack.frontend._catalog.find("tiny")
    model.router = Keeper(model.router, outcome)


async def test_a_kept_decision_is_shown_with_its_outcome(stack):
    await stack.start()
    keep(stack, OUTCOME)
    reply = await stack.get("/v1/decisions/abc-1%2F%C3%B6")
    assert reply.status == 200
    assert reply.json["decision"]["policy"] == "kv"
    assert reply.json["decision"]["cached_tokens"] == 32
    assert reply.json["outcome"]["ttft_s"] == 0.5


async def test_a_decision_whose_request_still_runs_has_no_outcome(stack):
    await stack.start()
    keep(stack)
    assert (await stack.get("/v1/decisions/abc-1%2F%C3%B6")).json["outcome"] is None


async def test_an_unknown_id_says_where_ids_are(stack):
    await stack.start()
    keep(stack)
    reply = await stack.get("/v1/decisions/nobody")
    assert reply.status == 404
    assert reply.json["error"]["code"] == "request.unknown_decision"
    assert "'nobody'" in reply.json["error"]["message"]
    assert "x-dynamo-decision-id" in reply.json["error"]["message"]


async def test_a_router_without_receipts_is_named_as_the_reason(stack):
    await stack.start()
    reply = await stack.get("/v1/decisions/abc-1")
    assert reply.status == 404
    assert "--router" in reply.json["error"]["message"]
