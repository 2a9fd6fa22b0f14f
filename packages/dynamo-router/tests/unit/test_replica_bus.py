from __future__ import annotations

import asyncio
import json
import signal
import struct
import sys
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio
from aiohttp import ClientSession
from aiohttp.test_utils import unused_port

from dynamo_core.errors import ConfigurationError
from dynamo_router._cli import main
from dynamo_router._replica_bus import ReplicaBus

ANY = "tcp://127.0.0.1:0"


async def until(condition):
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def service(*flags):
    """A ``dynamo-router serve`` as a process of its own; gives the URL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys; from dynamo_router._cli import main; sys.exit(main())"),
        *("serve", "--port", "0", "--policy", "least-loaded", *flags),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            line = ""
            while "selects on" not in line:
                line = (await process.stdout.readline()).decode()
                assert line, "it ended before it served"
        yield line.rsplit(" ", 1)[1].strip()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def call(session, method, url, body=None):
    async with session.request(method, url, data=None if body is None else json.dumps(body)) as response:
        assert response.status < 300, await response.text()
        return await response.json()


async def active(session, url):
    [pool] = await call(session, "GET", f"{url}/loads")
    return [load["projected"].get("active_requests", 0) for load in pool["workers"]]


async def test_services_count_what_the_others_book():
    ports = unused_port(), unused_port()
    one, two = (f"tcp://127.0.0.1:{port}" for port in ports)
    asked = {"token_ids": list(range(64))}
    async with (
        service("--replica-sync-bind", two, "--replica-sync-peers", f'["{one}"]') as second,
        ClientSession() as s,
    ):
        async with service("--replica-sync-bind", one, "--replica-sync-peers", f'["{two}"]') as first:
            for url in (first, second):
                for worker in (1, 2):
                    await call(
                        s, "POST", f"{url}/workers", {"worker_id": worker, "block_size": 16, "endpoint": "http://w"}
                    )
            booked = await call(s, "POST", f"{first}/select_and_reserve", asked)

            async def seen():
                return sum(await active(s, second)) == 1

            await until(seen)
            # The second service has booked nothing itself, and yet knows which worker is free.
            other = await call(s, "POST", f"{second}/select_and_reserve", asked)
            assert {booked["worker_id"], other["worker_id"]} == {1, 2}

            async def both():
                return await active(s, first) == await active(s, second) == [1, 1]

            await until(both)
            await call(s, "DELETE", f"{first}/reservations/{booked['reservation_id']}")
            await until(seen)
            await call(s, "POST", f"{first}/select_and_reserve", asked)

            async def all_known():
                return sum(await active(s, second)) == 2

            await until(all_known)
        # The first service has said goodbye, and what it had booked goes with it.
        await until(seen)


async def test_losses_and_strange_messages_are_told_apart():
    context = zmq.asyncio.Context()
    peer = context.socket(zmq.PUB)
    peer.setsockopt(zmq.LINGER, 0)
    peer.bind(ANY)
    heard = asyncio.Queue()
    bus = ReplicaBus(
        ANY,
        [peer.getsockopt_string(zmq.LAST_ENDPOINT)],
        on_message=lambda publisher, payload: heard.put_nowait((publisher, payload)),
        on_lost=lambda publisher: heard.put_nowait((publisher, "lost")),
    )
    await bus.start()
    try:
        number = 0

        async def connected():
            nonlocal number
            number += 1
            await peer.send_multipart([struct.pack("<QQ", 1, number), b"hello"])
            return not heard.empty()

        await until(connected)
        await peer.send_multipart([b"short"])
        await peer.send_multipart([struct.pack("<QQ", 7, 1), b"a"])
        await peer.send_multipart([struct.pack("<QQ", 7, 4), b"b"])
        async with asyncio.timeout(30):
            items = [item async for item in until_last(heard, (7, b"b"))]
        assert set(items[:-3]) == {(1, b"hello")}
        assert items[-3:] == [(7, b"a"), (7, "lost"), (7, b"b")]
    finally:
        await bus.close()
        await bus.close()
        peer.close()
        context.term()


async def until_last(queue, last):
    item = None
    while item != last:
        item = await queue.get()
        yield item


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:notaport", "nowhere"])
async def test_an_address_that_cannot_be_used_is_refused(address):
    bus = ReplicaBus(ANY, [address], on_message=lambda *_: None, on_lost=lambda *_: None)
    with pytest.raises(ConfigurationError, match="give tcp://HOST:PORT"):
        await bus.start()


def test_peers_without_an_own_address_are_refused(capsys):
    assert main(["serve", "--port", "0", "--replica-sync-peers", '["tcp://127.0.0.1:5"]']) != 0
    assert "give it too" in capsys.readouterr().err
