"""TLS of the TCP request plane: who is let in, who is trusted, and certificates that are renewed."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.streams import call_unary
from dynamo_runtime._plane.plane import TcpRequestPlane, tcp_request_plane

ENDPOINT = EndpointId("test", "backend", "generate")


async def echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)


def plane(**options: object) -> TcpRequestPlane:
    made = tcp_request_plane("tcp://127.0.0.1:0", clock=SystemClock(), options=options)
    assert isinstance(made, TcpRequestPlane)
    return made


@pytest.fixture
def proof(authority: Any) -> dict[str, object]:
    cert, key = authority.issue("127.0.0.1", "worker.test", to="server")
    return {"tls_ca": str(authority.ca_file), "tls_cert": str(cert), "tls_key": str(key)}


async def test_caller_without_a_certificate_is_not_let_in(proof: dict[str, object]) -> None:
    server = plane(**proof)
    served = await server.serve(ENDPOINT, echo)
    for options in ({"tls_ca": proof["tls_ca"]}, {}):
        stranger = plane(**options)
        with pytest.raises(UnavailableError) as caught:
            await call_unary(stranger, served.address, ENDPOINT, b"x")
        assert caught.value.reason.startswith("transport.")
        await stranger.close()
    friend = plane(**proof)
    assert await call_unary(friend, served.address, ENDPOINT, b"x") == b"x"
    await friend.close()
    await server.close()


async def test_server_must_have_the_name_that_is_expected(proof: dict[str, object]) -> None:
    server = plane(**proof)
    served = await server.serve(ENDPOINT, echo)
    right, wrong = plane(**proof, tls_server_name="worker.test"), plane(**proof, tls_server_name="another.test")
    assert await call_unary(right, served.address, ENDPOINT, b"x") == b"x"
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        await call_unary(wrong, served.address, ENDPOINT, b"x")
    assert "another.test" in caught.value.diagnostic
    for each in (right, wrong, server):
        await each.close()


async def test_server_of_another_authority_is_not_trusted(proof: dict[str, object], tmp_path: Path) -> None:
    import trustme

    other = trustme.CA()
    other.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server, client = plane(**proof), plane(**{**proof, "tls_ca": str(tmp_path / "ca.pem")})
    served = await server.serve(ENDPOINT, echo)
    with pytest.raises(UnavailableError) as caught:
        await call_unary(client, served.address, ENDPOINT, b"x")
    assert "certificate verify failed" in caught.value.diagnostic
    await client.close()
    await server.close()


async def serial(address: str, proof: dict[str, object]) -> str:
    """Return the serial number of the certificate that a server shows now."""
    import asyncio

    context = ssl.create_default_context(cafile=str(proof["tls_ca"]))
    context.load_cert_chain(str(proof["tls_cert"]), str(proof["tls_key"]))
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("peercert")["serialNumber"]
    writer.close()
    return str(shown)


async def test_renewed_certificate_is_shown_to_new_connections_and_running_ones_stay(
    authority: Any, proof: dict[str, object]
) -> None:
    server, client = plane(**proof, tls_reload_interval_s=1e-6), plane(**proof)
    served = await server.serve(ENDPOINT, echo)
    assert await call_unary(client, served.address, ENDPOINT, b"x") == b"x"
    first = await serial(served.address, proof)
    authority.issue("127.0.0.1", to="server")
    second = await serial(served.address, proof)
    assert second != first
    assert await call_unary(client, served.address, ENDPOINT, b"y") == b"y"
    assert client.connects == 1
    # A file that is half written changes nothing.
    whole = Path(str(proof["tls_cert"])).read_bytes()
    Path(str(proof["tls_cert"])).write_bytes(whole[:100])
    probe = {**proof, "tls_cert": str(Path(str(proof["tls_cert"])).with_name("whole.pem"))}
    Path(str(probe["tls_cert"])).write_bytes(whole)
    assert await serial(served.address, probe) == second
    await client.close()
    await server.close()


def test_bad_configuration_is_told_before_anything_starts(proof: dict[str, object], tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for options, named in (
        ({**proof, "tls_key": ""}, "tls_key"),
        ({**proof, "tls_cert": ""}, "tls_cert"),
        ({**proof, "tls_ca": "/absent.pem"}, "tls_ca /absent.pem"),
        ({**proof, "tls_ca": str(garbage)}, "no usable PEM"),
        ({**proof, "tls_cert": str(garbage)}, "no certificate with its unencrypted key"),
        ({**proof, "tls_key": "/absent.key"}, "tls_key /absent.key cannot be read"),
        ({**proof, "tls_reload_interval_s": 0}, "tls_reload_interval_s"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            plane(**options)


async def test_authority_alone_cannot_serve(proof: dict[str, object]) -> None:
    caller = plane(tls_ca=proof["tls_ca"])
    with pytest.raises(ConfigurationError, match="which a server needs"):
        await caller.serve(ENDPOINT, echo)
    await caller.close()
