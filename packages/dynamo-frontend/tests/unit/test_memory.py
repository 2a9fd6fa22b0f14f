"""Requests leave nothing behind, and nothing for the garbage collector to find."""

import asyncio
import gc

import pytest

from dynamo_frontend._generation import Generation
from dynamo_frontend._openai.stream import ChatStream
from dynamo_frontend._reply import Reply

KINDS = (Reply, Generation, ChatStream)


def alive():
    return {id(item) for item in gc.get_objects() if type(item) in KINDS}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_requests_leave_no_circles(stack, path, stream):
    stack.say("one two three")
    await stack.start(workers=1)
    body = {"model": "tiny", "stream": stream}
    if path == "/v1/responses":
        body["input"] = "Hi"
    else:
        body |= {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
    for _ in range(3):
        assert (await stack.post(path, body)).status == 200
    gc.collect()
    # Other tests' objects may still be held, by tracebacks for one; only what is new counts.
    before = alive()
    gc.disable()
    try:
        for _ in range(5):
            await stack.post(path, body)
        # The last call's own end is told a few ticks after its answer.
        async with asyncio.timeout(10):
            while alive() - before:
                await asyncio.sleep(0)
    finally:
        gc.enable()
