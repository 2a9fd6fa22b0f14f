"""TLS of the server and towards engines, with real certificates."""

import asyncio
import ssl

import pytest
import trustme

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_frontend._gateway.gateway import Gateway
from dynamo_frontend._http.tls import ServerTls
from dynamo_frontend._routes import Route, Routes
from dynamo_frontend._server import HttpServer
from dynamo_frontend._settings import FrontendSettings, GatewaySettings


class Files:
    """Certificate files of an authority."""

    def __init__(self, folder):
        self.cert, self.key, self.ca = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"

    def write(self, authority, clients=None):
        server = authority.issue_cert("127.0.0.1", "localhost")
        self.key.write_bytes(server.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
        self.ca.write_bytes((clients or authority).cert_pem.bytes())
        return self


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@pytest.fixture
async def serve():
    servers = []

    async def start(tls):
        app = Routes({"/": Route({"GET": lambda request, response: response.send(200, b"hello", "text/plain")})})
        server = HttpServer(app, SystemClock())
        servers.append(server)
        await server.start("127.0.0.1", 0, tls=tls)
        return server

    yield start
    for server in servers:
        await server.stop()


def trusting(authority, identity=None):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if identity is not None:
        identity.configure_cert(context)
    return context


async def ask(server, context):
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if not answer:
            # In TLS 1.3 a server refuses a client's certificate after the client's handshake is over.
            raise ConnectionError("refused")
        return answer


async def test_replies_over_tls(serve, files):
    authority = trustme.CA()
    files.write(authority)
    server = await serve(ServerTls(str(files.cert), str(files.key)))
    assert server.scheme == "https"
    assert (await ask(server, trusting(authority))).endswith(b"hello")
    with pytest.raises(ssl.SSLError):
        await ask(server, trusting(trustme.CA()))
    old = trusting(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert (await ask(server, old)).endswith(b"hello")


async def test_clients_must_show_a_certificate(serve, files):
    authority, clients = trustme.CA(), trustme.CA()
    files.write(authority, clients)
    server = await serve(ServerTls(str(files.cert), str(files.key), str(files.ca)))
    identity = clients.issue_cert("me@example.org")
    assert (await ask(server, trusting(authority, identity))).endswith(b"hello")
    for other in (None, trustme.CA().issue_cert("me@example.org")):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(server, trusting(authority, other))
    assert server.connections == 0


async def test_changed_files_are_used_for_new_connections(serve, files):
    first, second, clients = trustme.CA(), trustme.CA(), trustme.CA()
    files.write(first, clients)
    identity = clients.issue_cert("me@example.org")
    tls = ServerTls(str(files.cert), str(files.key), str(files.ca))
    server = await serve(tls)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=trusting(first, identity))
    others = trustme.CA()
    files.write(second, others)
    tls.reload()
    newcomer = others.issue_cert("you@example.org")
    assert (await ask(server, trusting(second, newcomer))).endswith(b"hello")
    with pytest.raises(ssl.SSLError):
        await ask(server, trusting(first, newcomer))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await ask(server, trusting(second, identity))
    # A connection from before goes on.
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert (await reader.read()).endswith(b"hello")
    writer.close()
    files.cert.write_text("damaged")
    tls.reload()
    assert (await ask(server, trusting(second, newcomer))).endswith(b"hello")


def test_wrong_files_are_named(files):
    files.write(trustme.CA())
    with pytest.raises(ConfigurationError, match="tls_key_path"):
        ServerTls(str(files.cert), "")
    with pytest.raises(ConfigurationError, match="does not exist"):
        ServerTls(str(files.cert), str(files.key) + "x")
    with pytest.raises(ConfigurationError, match="no certificate with its unencrypted key"):
        ServerTls(str(files.ca), str(files.key))
    files.ca.write_text("nothing")
    with pytest.raises(ConfigurationError, match="tls_client_ca_cert_path"):
        ServerTls(str(files.cert), str(files.key), str(files.ca))
    with pytest.raises(ConfigurationError, match="upstream_ca_path"):
        settings = GatewaySettings(upstream=["https://127.0.0.1:1"], upstream_ca_path=str(files.ca))
        Gateway(settings, Metrics(), SystemClock())


async def test_frontend_serves_over_tls(stack, files):
    authority = trustme.CA()
    files.write(authority)
    await stack.start(workers=0, tls_cert_path=str(files.cert), tls_key_path=str(files.key))
    assert stack.frontend.url.startswith("https://")
    context = trusting(authority)
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.frontend.server.port, ssl=context)
    writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b"live" in await reader.read()
    writer.close()
    assert FrontendSettings().server_tls() is None


async def engine(reader, writer):
    """An engine that lists one model and answers everything with one text."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        lines = head.lower().split(b"\r\n")
        await reader.readexactly(sum(int(line[16:]) for line in lines if line.startswith(b"content-length: ")))
        body = b'{"data":[{"id":"m"}]}' if b"/v1/models" in head else b'{"saw":"key"}'
        assert b"Bearer up" in head
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize("trusted", [True, False])
async def test_engines_behind_https(files, trusted):
    authority = trustme.CA()
    files.write(authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(files.cert), str(files.key))
    if not trusted:
        files.ca.write_bytes(trustme.CA().cert_pem.bytes())
    upstream = await asyncio.start_server(engine, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
    settings = GatewaySettings(
        upstream=[url], http_port=0, upstream_ca_path=str(files.ca), upstream_api_key="up", drain_timeout_s=0
    )
    gateway = Gateway(settings, Metrics(), SystemClock())
    await gateway.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
        writer.write(
            b'POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 13\r\nconnection: close\r\n\r\n{"model":"m"}'
        )
        answer = await reader.read()
        writer.close()
        assert (b'"saw":"key"' if trusted else b"model_not_found") in answer
    finally:
        await gateway.stop()
        upstream.close()
