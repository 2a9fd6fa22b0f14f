from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.cards import EndpointTypes
from dynamo_core.discovery import Instance
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import EndpointId
from dynamo_core.planning import TrafficStats
from dynamo_core.wire import TRAFFIC_STATS
from dynamo_runtime._cli import main
from dynamo_runtime._operate import encode_payload, show_item

LIMIT_S = 30.0

SERVER = """
import asyncio, sys
from dynamo_runtime import Runtime, RuntimeSettings

async def shout(payload, call, sink):
    for word in payload.upper().split():
        sink.send(b'{"word": "%s"}' % word.strip(b'"'))

async def main():
    settings = RuntimeSettings(discovery=sys.argv[1], request_plane=sys.argv[2], event_bus="mem://")
    async with Runtime(settings) as runtime:
        announced = await runtime.serve("demo.text.shout", shout)
        print(format(announced.instance.instance_id, "x"), flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


class Server:
    """A process that serves ``demo.text.shout``."""

    def __init__(self, discovery: str, request_plane: str) -> None:
        self.discovery = discovery
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, discovery, request_plane],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.instance_id = self.process.stdout.readline().strip()

    def stop(self) -> None:
        self.process.communicate(timeout=LIMIT_S)


@pytest.fixture(params=["tcp://127.0.0.1:0", "unix"], scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tmp_path = tmp_path_factory.mktemp("planes")
    plane = f"unix://{tmp_path}/s" if request.param == "unix" else request.param
    server = Server(f"file://{tmp_path}/d", plane)
    yield server
    server.stop()


def test_operators_look_where_their_process_environment_points(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_RUNTIME_DISCOVERY", server.discovery)
    assert main(["instances"]) == 0
    assert server.instance_id in capsys.readouterr().out


def test_wrong_instance_is_named_before_anything_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["call", "a.b.c@nobody", "{}", "--discovery", "mem://"]) == 1
    assert "instance id 'nobody'" in capsys.readouterr().err


def test_instances_lists_who_serves_what(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["instances", "--discovery", server.discovery]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == ["demo.text.shout", server.instance_id]
    assert f"pid={server.process.pid}" in line
    assert main(["instances", "--discovery", server.discovery, "--namespace", "other"]) == 0
    assert capsys.readouterr().out == ""


def test_call_prints_each_item_as_a_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["call", "demo.text.shout", '"good day"', "--discovery", server.discovery]) == 0
    assert capsys.readouterr().out.splitlines() == ['{"word":"GOOD"}', '{"word":"DAY"}']


def test_call_reads_stdin_and_may_name_the_instance(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('"hi"'))
    assert main(["call", f"demo.text.shout@{server.instance_id}", "-", "--discovery", server.discovery]) == 0
    assert capsys.readouterr().out == '{"word":"HI"}\n'


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["call", "demo.text.whisper", "{}"], "nobody serves demo.text.whisper"),
        (["call", "demo.text.shout", "{"], "payload is not JSON"),
        (["call", "demo.text.shout@abc", "{}"], "instance abc does not serve"),
        (["call", "shout", "{}"], "namespace.component.endpoint"),
    ],
)
def test_call_says_what_is_wrong_in_one_line(
    argv: list[str], part: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--discovery", server.discovery]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


def test_watch_follows_what_comes_and_goes(tmp_path: Path) -> None:
    discovery = f"file://{tmp_path}/d"
    watcher = subprocess.Popen(
        [sys.executable, "-m", "dynamo_runtime", "watch", "--discovery", discovery, "--json-lines"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None
    try:
        assert json.loads(watcher.stdout.readline())["event"] == "synced"
        server = Server(discovery, "tcp://127.0.0.1:0")
        key = f"v1/instances/demo/text/shout/{server.instance_id}"
        assert json.loads(watcher.stdout.readline()) == {"event": "put", "key": key}
        server.stop()
        assert json.loads(watcher.stdout.readline()) == {"event": "deleted", "key": key}
    finally:
        watcher.kill()
        watcher.communicate()


def instance_of(schema: str) -> Instance:
    types = EndpointTypes(request=schema, response=schema)
    return Instance(EndpointId("a", "b", "c"), 1, "mem://x", types)


def test_a_typed_payload_is_encoded_as_the_endpoint_declares() -> None:
    instance = instance_of(TRAFFIC_STATS.schema)
    payload = encode_payload(instance, '{"model": "m", "interval_s": 2, "requests": 3}')
    stats = TrafficStats("m", 2.0, requests=3)
    assert TRAFFIC_STATS.decode(payload) == stats
    assert json.loads(show_item(instance, payload)) == {"model": "m", "interval_s": 2.0, "requests": 3}
    with pytest.raises(InvalidRequestError, match="interval_s"):
        encode_payload(instance, '{"model": "m"}')


def test_untyped_items_are_shown_as_json_in_any_case() -> None:
    instance = instance_of("")
    assert show_item(instance, b'{"a":1}') == '{"a":1}'
    assert show_item(instance, b"\x81\xa1a\x01") == '{"a":1}'
    assert show_item(instance, b"\xc1\xff") == '"\\\\xc1\\\\xff"'
