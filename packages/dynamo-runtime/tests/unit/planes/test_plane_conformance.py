"""The request planes keep the contract: TCP, unix sockets, TLS, and NATS with a real server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.planes import RequestPlane
from dynamo_core.testing import RequestPlaneConformance
from dynamo_runtime._plane.connection import FRAME_OVERHEAD_BYTES
from dynamo_runtime._plane.options import PlaneOptions

MAX_PAYLOAD_BYTES = PlaneOptions().max_frame_bytes - FRAME_OVERHEAD_BYTES


class TcpSuite:
    max_payload_bytes = MAX_PAYLOAD_BYTES

    @pytest.fixture(autouse=True)
    def _dead_port(self) -> Iterator[None]:
        # Bound but not listening: connecting is refused, and nobody else can take the port meanwhile.
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            self._port = holder.getsockname()[1]
            yield

    async def make_plane(self) -> RequestPlane:
        factory = plugins.load("request_planes", "tcp")
        return factory("tcp://127.0.0.1:0", clock=SystemClock(), options={})

    def unreachable_address(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"


class UnixSuite:
    max_payload_bytes = MAX_PAYLOAD_BYTES

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self._path = tmp_path

    async def make_plane(self) -> RequestPlane:
        factory = plugins.load("request_planes", "unix")
        return factory(f"unix://{self._path}", clock=SystemClock(), options={})

    def unreachable_address(self) -> str:
        return f"unix://{self._path}/absent.sock"


class TlsSuite(TcpSuite):
    @pytest.fixture(autouse=True)
    def _certificates(self, authority: Any) -> None:
        cert, key = authority.issue("127.0.0.1", to="plane")
        self._tls = {"tls_ca": str(authority.ca_file), "tls_cert": str(cert), "tls_key": str(key)}

    async def make_plane(self) -> RequestPlane:
        factory = plugins.load("request_planes", "tcp")
        return factory("tcp://127.0.0.1:0", clock=SystemClock(), options=self._tls)


class NatsSuite:
    max_payload_bytes = MAX_PAYLOAD_BYTES

    @pytest.fixture(autouse=True)
    def _server(self, shared_nats: Any) -> None:
        self._host_port = shared_nats.host_port

    async def make_plane(self) -> RequestPlane:
        factory = plugins.load("request_planes", "nats")
        return factory(f"nats://{self._host_port}", clock=SystemClock(), options={})

    def unreachable_address(self) -> str:
        return f"nats://{self._host_port}/nobody"


class TestTcp(TcpSuite, RequestPlaneConformance):
    pass


class TestUnix(UnixSuite, RequestPlaneConformance):
    pass


class TestTls(TlsSuite, RequestPlaneConformance):
    pass


class TestNats(NatsSuite, RequestPlaneConformance):
    pass
