"""Several processes on one port, as the command runs them."""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from dynamo_frontend._gateway.workers import join_metrics, reserve_port


def test_metrics_of_all_processes_stand_by_family():
    one = b'# HELP a A.\n# TYPE a counter\na{worker="0"} 1.0\n# HELP b B.\n# TYPE b gauge\nb{worker="0"} 2.0\n'
    two = one.replace(b'"0"', b'"1"')
    assert join_metrics([one, two]).decode().splitlines() == [
        "# HELP a A.",
        "# TYPE a counter",
        'a{worker="0"} 1.0',
        'a{worker="1"} 1.0',
        "# HELP b B.",
        "# TYPE b gauge",
        'b{worker="0"} 2.0',
        'b{worker="1"} 2.0',
    ]


async def fetch(port, path):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer.decode()


def children(pid):
    return {int(name) for name in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


async def until(check):
    async with asyncio.timeout(30):
        while not (found := await check()):
            await asyncio.sleep(0.05)
        return found


class Command:
    """``dynamo-frontend serve`` as a process."""

    def __init__(self, process):
        self.process = process
        self.port = 0

    async def listening(self):
        async with asyncio.timeout(30):
            while line := (await self.process.stdout.readline()).decode():
                if found := re.search(r"url=http://127\.0\.0\.1:(\d+)", line):
                    self.port = int(found[1])
                    return
        raise AssertionError("it ended before it listened")

    async def workers_seen(self):
        text = await fetch(self.port, "/metrics")
        return set(re.findall(r'gateway_upstream_up\{.*?worker="(\d)"', text))


@pytest.fixture
async def command():
    running = []

    async def start(*arguments):
        argv = [sys.executable, "-m", "dynamo_frontend", "serve", *arguments]
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        running.append(process)
        return Command(process)

    yield start
    for process in running:
        if process.returncode is None:
            process.kill()
        await process.communicate()


ARGUMENTS = ("--upstream", "http://127.0.0.1:9", "--http-port", "0", "--drain-timeout-s", "2")


async def test_workers_share_the_port_and_are_kept_alive(command):
    found = await command(*ARGUMENTS, "--workers", "2")
    await found.listening()
    pid = found.process.pid

    async def both():
        return await found.workers_seen() == {"0", "1"}

    await until(both)
    before = children(pid)
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)

    async def replaced():
        now = children(pid)
        return len(now) == 2 and now != before

    await until(replaced)
    await until(both)
    found.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await found.process.wait() == 0
    assert not any(Path(f"/proc/{child}").exists() for child in before)


async def test_workers_end_with_the_process_that_started_them(command):
    found = await command(*ARGUMENTS, "--workers", "2")
    await found.listening()
    workers = children(found.process.pid)
    found.process.kill()
    await found.process.wait()

    async def gone():
        return not any(Path(f"/proc/{child}").exists() for child in workers)

    await until(gone)


async def test_workers_that_are_set_up_wrongly_end_all(command):
    found = await command(*ARGUMENTS, "--workers", "2", "--tls-cert-path", "/nowhere.pem")
    output, _ = await asyncio.wait_for(found.process.communicate(), 30)
    assert found.process.returncode == 2
    assert b"tls_key_path" in output


def test_a_shared_port_is_bound_and_does_not_listen():
    holder, port = reserve_port("127.0.0.1", 0)
    with holder:
        again, same = reserve_port("127.0.0.1", port)
        again.close()
        assert same == port
