"""Sockets of the server: where they listen, and how they are set up."""

import asyncio
import socket

import pytest

from dynamo_core.clock import SystemClock
from dynamo_frontend._routes import Route, Routes
from dynamo_frontend._server import HttpServer


@pytest.fixture
async def server():
    app = Routes({"/": Route({"GET": lambda request, response: response.send(200, b"hello", "text/plain")})})
    found = HttpServer(app, SystemClock())
    await found.start("127.0.0.1", 0)
    yield found
    await found.stop()


async def test_it_listens_on_the_address_it_was_given_and_no_other(server):
    assert [sock.getsockname() for sock in server._server.sockets] == [("127.0.0.1", server.port)]
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.2", server.port)


async def test_no_connection_waits_to_fill_a_packet(server):
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(10):
        while not server.connections:
            await asyncio.sleep(0)
    (connection,) = server._connections
    sock = connection._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
