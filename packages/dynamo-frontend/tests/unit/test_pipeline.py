"""What a request's options become on their way to the engine."""

import msgspec
import pytest

from dynamo_core.cards import LoraInfo
from dynamo_core.discovery import ModelRecord
from dynamo_core.tokens import BlockHasher, unpack_tokens
from dynamo_core.wire import MODEL_RECORD
from dynamo_frontend._attempts import routing_request

TEXT = "The capital of Japan is Tokyo."


@pytest.fixture
async def served(stack):
    stack.say(TEXT)
    await stack.start(workers=2)
    return stack


async def last(stack):
    return stack.script.requests[-1]


@pytest.mark.parametrize("send", ["chat", "complete"])
async def test_limits_reach_the_engine(served, send):
    options = {"min_tokens": 2, "max_tokens": 9, "ignore_eos": True, "stop_token_ids": [7], "stop": ["zzz", 8]}
    reply = await getattr(served, send)(**options)
    assert reply.status == 200
    stop = (await last(served)).stop
    assert (stop.min_tokens, stop.max_tokens, stop.ignore_eos) == (2, 9, True)
    assert set(stop.stop_token_ids) == {7, 8}
    assert stop.stop == ("zzz",)


@pytest.mark.parametrize("stream", [False, True])
async def test_no_stop_string_counts_before_min_tokens(served, stream):
    whole = await served.complete(stop=[" capital"], min_tokens=4)
    assert whole.json["choices"][0]["text"] == TEXT
    cut = await served.complete(stop=[" capital"], min_tokens=1)
    assert cut.json["choices"][0]["text"] == "The"


async def test_sampling_reaches_the_engine(served):
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 42,
        "n": 2,
        "logit_bias": {"5": -100},
        "allowed_token_ids": [1, 2],
    }
    await served.chat(**options)
    sampling = msgspec.to_builtins((await last(served)).sampling)
    assert sampling == {**options, "logit_bias": {5: -100.0}, "allowed_token_ids": (1, 2)}


@pytest.mark.parametrize("place", ["body", "header"])
async def test_a_cache_salt_separates_kv_keys(served, place):
    plain = (await served.chat(), await last(served))[1]
    if place == "body":
        await served.chat(cache_salt="mine")
    else:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "cache_salt": "loses"}
        await served.post("/v1/chat/completions", body, {"x-tenant-id": "mine"})
    salted = await last(served)
    assert salted.routing.cache_salt == "mine"
    card = msgspec.structs.replace(served.card, kv_block_size=4)
    expected = BlockHasher(4, salt="mine").hash_tokens(salted.token_ids).local
    assert routing_request(salted, card, ()).local_hashes == expected
    assert routing_request(plain, card, ()).local_hashes != expected


async def test_batches_of_token_ids_are_requests_of_their_own(served):
    batch = [[5, 6], [7, 8, 9], [10]]
    reply = await served.complete(batch, n=2, logprobs=0)
    assert [choice["index"] for choice in reply.json["choices"]] == list(range(6))
    assert [list(unpack_tokens(request.token_ids)) for request in served.script.requests] == batch
    assert {request.sampling.n for request in served.script.requests} == {2}
    assert reply.json["usage"]["prompt_tokens"] == 6
    assert all(choice["logprobs"]["tokens"] for choice in reply.json["choices"])


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_of_token_ids_is_their_text(served, stream):
    ids = served.tokenizer.encode("Say: ", add_special_tokens=False).ids
    reply = await served.complete([ids, ids], echo=True, n=2, stream=stream)
    if stream:
        texts = ["", "", "", ""]
        for event in reply.events[:-1]:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        texts = [choice["text"] for choice in reply.json["choices"]]
    assert texts == ["Say: " + TEXT] * 4


async def test_both_forms_of_logprobs_agree(served):
    chat = (await served.chat(logprobs=True, top_logprobs=2)).json["choices"][0]["logprobs"]["content"]
    old = (await served.complete(logprobs=2)).json["choices"][0]["logprobs"]
    assert [entry["token"] for entry in chat] == old["tokens"]
    assert [entry["logprob"] for entry in chat] == old["token_logprobs"]
    assert [len(entry["top_logprobs"]) for entry in chat] == [2] * len(chat)
    assert bytes(byte for entry in chat for byte in entry["bytes"]).decode() == TEXT
    ids = (await served.complete(logprobs=0, return_tokens_as_token_ids=True)).json["choices"][0]["logprobs"]
    assert ids["tokens"] == [f"token_id:{token}" for token in served.script.output]


# --- LoRA


@pytest.fixture
async def adapted(served):
    """The second of two workers has the adapter ``poet`` loaded."""
    worker = served.workers[1]
    card = msgspec.structs.replace(served.card, name="poet", aliases=(), lora=LoraInfo("poet", "tiny"))
    record = ModelRecord(worker_endpoint(), worker.instance_id, card, suffix="poet")
    await served.discovery.put(record.key, MODEL_RECORD.encode(record), lease=worker.lease)
    await served.ready("poet")
    return served


def worker_endpoint():
    from dynamo_core import EndpointId

    return EndpointId("test", "backend", "generate")


@pytest.mark.parametrize("name", ["poet", "tiny:poet", "tiny-alias:poet"])
async def test_an_adapter_is_served_by_name_where_it_is_loaded(adapted, name):
    for _ in range(4):
        reply = await adapted.chat(model=name)
        assert reply.status == 200, reply.body
        assert reply.json["model"] == name
        assert reply.headers["x-dynamo-worker-id"].startswith("2")
    request = await last(adapted)
    assert (request.model, request.routing.lora) == ("poet", "poet")
    assert request.routing.allowed_instance_ids == (2,)
    card = msgspec.structs.replace(adapted.card, kv_block_size=4)
    assert (
        routing_request(request, card, ()).local_hashes == BlockHasher(4, "poet").hash_tokens(request.token_ids).local
    )


async def test_base_requests_do_not_name_an_adapter(adapted):
    await adapted.chat()
    assert (await last(adapted)).routing.lora == ""
    listed = {model["id"]: model for model in (await adapted.get("/v1/models")).json["data"]}
    assert listed["poet"]["parent"] == "tiny"


@pytest.mark.parametrize("name", ["poet:tiny", "other:poet", "tiny:other", "tiny:", ":poet", "tiny:tiny"])
async def test_names_that_are_no_adapter(adapted, name):
    assert (await adapted.chat(model=name)).status == 404
