"""Which models are served, as workers come and go."""

import asyncio

import msgspec

from dynamo_core.enums import WorkerType


async def names(stack):
    return [model["id"] for model in (await stack.get("/v1/models")).json["data"]]


async def until(stack, check):
    async with asyncio.timeout(20):
        while not await check():
            await asyncio.sleep(0)


async def test_models_come_and_go_with_their_workers(stack):
    await stack.start(workers=0)
    assert await names(stack) == []
    assert (await stack.get("/ready")).status == 503
    assert (await stack.chat()).status == 404
    worker = await stack.add_worker(1)
    await stack.ready()
    assert await names(stack) == ["tiny", "tiny-alias"]
    ready = await stack.get("/ready")
    assert (ready.status, ready.json["models"]) == (200, ["tiny"])
    await worker.lease.revoke()

    async def gone():
        return await names(stack) == []

    await until(stack, gone)
    assert (await stack.chat()).status == 404


async def test_one_model_by_id(stack):
    await stack.start()
    found = await stack.get("/v1/models/tiny")
    assert found.json == {
        "id": "tiny",
        "object": "model",
        "created": found.json["created"],
        "owned_by": "dynamo",
        "context_window": 4096,
        "max_model_len": 4096,
    }
    assert (await stack.get("/v1/models/tiny-alias")).json["root"] == "tiny"
    assert (await stack.get("/v1/models/other")).json["error"]["code"] == "model_not_found"


async def test_worker_with_another_card_is_kept_out(stack):
    stack.say("fine")
    await stack.start(workers=1)
    await stack.add_worker(2, msgspec.structs.replace(stack.card, kv_block_size=32))

    async def counted():
        metrics = (await stack.get("/metrics")).body.decode()
        return 'dynamo_frontend_model_conflicting_cards{model="tiny"} 1.0' in metrics

    await until(stack, counted)
    for _ in range(4):
        reply = await stack.chat()
        assert reply.headers["x-dynamo-worker-id"] == "1/0"


async def test_models_at_one_endpoint_never_answer_for_each_other(stack, tmp_path):
    stack.say("fine")
    await stack.start(workers=1)
    await stack.add_worker(2, msgspec.structs.replace(stack.card, name="other", aliases=()))
    broken = msgspec.structs.replace(stack.card, name="broken", model_path=str(tmp_path), aliases=())
    await stack.add_worker(3, broken)
    await stack.ready("other")

    async def refused():
        return "broken" in (await stack.get("/metrics")).body.decode() or bool(stack.frontend._catalog.failures())

    await until(stack, refused)
    for model, worker in (("tiny", "1/0"), ("other", "2/0")) * 3:
        reply = await stack.chat(model=model)
        assert (reply.status, reply.headers["x-dynamo-worker-id"]) == (200, worker)
    await stack.workers[0].lease.revoke()

    async def gone():
        return await names(stack) == ["other"]

    await until(stack, gone)
    for _ in range(3):
        assert (await stack.chat(model="other")).headers["x-dynamo-worker-id"] == "2/0"


async def test_kept_out_worker_takes_over_when_the_others_are_gone(stack):
    await stack.start(workers=1)
    await stack.add_worker(2, msgspec.structs.replace(stack.card, context_length=512))
    await stack.workers[0].lease.revoke()

    async def changed():
        return (await stack.get("/v1/models/tiny")).json.get("context_window") == 512

    await until(stack, changed)


async def test_model_that_needs_a_prefill_worker_is_not_ready_alone(stack):
    card = msgspec.structs.replace(stack.card, worker_type=WorkerType.DECODE, needs=((WorkerType.PREFILL,),))
    await stack.start(workers=0)
    await stack.add_worker(1, card)

    async def known():
        return (await stack.chat()).status == 503

    await until(stack, known)
    assert await names(stack) == []


async def test_model_without_files_is_refused_with_the_reason(stack, tmp_path):
    await stack.start(workers=0)
    await stack.add_worker(1, msgspec.structs.replace(stack.card, model_path=str(tmp_path)))

    async def explained():
        return any("tokenizer" in reason for reason in (await stack.get("/ready")).json["reasons"])

    await until(stack, explained)
    assert (await stack.get("/ready")).status == 503


async def test_health_and_live(stack):
    await stack.start()
    assert (await stack.get("/live")).json == {"status": "live"}
    assert (await stack.get("/health")).json["models"] == ["tiny"]
    await stack.frontend.drain(1.0)
    assert (await stack.get("/health")).status == 503
    assert (await stack.get("/live")).status == 200


def conflicts(stack):
    (model,) = stack.frontend._catalog._models.values()
    return len(model.records), len(model.conflicts)


async def split_cards(stack):
    needs = ((WorkerType.PREFILL,),)
    decode = msgspec.structs.replace(stack.card, worker_type=WorkerType.DECODE, needs=needs)
    return decode, msgspec.structs.replace(stack.card, worker_type=WorkerType.PREFILL)


async def test_prefill_worker_at_the_same_endpoint_is_no_conflict_and_gets_no_request(stack):
    stack.say("fine")
    decode, prefill = await split_cards(stack)
    await stack.start(workers=0)
    await stack.add_worker(1, decode)
    await stack.add_worker(2, prefill)
    await stack.ready()
    assert conflicts(stack) == (2, 0)
    for _ in range(4):
        assert (await stack.chat()).headers["x-dynamo-worker-id"] == "1/0"


async def test_each_role_agrees_on_a_card_of_its_own(stack):
    decode, prefill = await split_cards(stack)
    await stack.start(workers=0)
    await stack.add_worker(1, decode)
    first = await stack.add_worker(2, prefill)
    await stack.add_worker(3, msgspec.structs.replace(prefill, context_length=1))
    # An aggregated worker answers as a decode worker does, so it must agree with it on all but its role.
    await stack.add_worker(4, stack.card)
    await stack.add_worker(5, msgspec.structs.replace(stack.card, context_length=1))
    await stack.ready()

    async def split(admitted, kept_out):
        return conflicts(stack) == (admitted, kept_out)

    await until(stack, lambda: split(3, 2))
    await first.lease.revoke()
    await until(stack, lambda: split(3, 1))
