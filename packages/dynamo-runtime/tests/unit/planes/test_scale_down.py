"""Drain under load: processes leave at random, and not one request is lost; nor are more than ran when a path is cut.

The load and its workers are processes of their own, on this machine's loopback device or each in a network of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REQUESTS = 1000
SIMULTANEOUS = 32
WORKERS = 4
SCALE_DOWNS = 3
LOAD = Path(__file__).with_name("scale_down_load.py")
# Without root, the namespaces are in one of the user's own.
NAMESPACES = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")

# The programs choose their own loops.
pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])


async def run_load(folder: Path, *options: object, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the load and return what it says; its processes end with it."""
    command = [*prefix, sys.executable, str(LOAD), str(folder), *map(str, options)]
    print(" ".join(command))
    load = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, start_new_session=True)
    try:
        said, _ = await asyncio.wait_for(load.communicate(), 180)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(load.pid, signal.SIGKILL)
    assert load.returncode == 0
    return json.loads(said)


def assert_nothing_lost(found: dict[str, Any]) -> None:
    assert found == {"answered": REQUESTS, "lost": [], "served": WORKERS, "ended": [0] * SCALE_DOWNS}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_random_scale_downs_lose_no_request(tmp_path: Path, loop: str) -> None:
    assert_nothing_lost(await run_load(tmp_path, "--loop", loop, "--seed", secrets.randbelow(1 << 32)))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("seed", [20_731, 1, 2, 3, 5, 8, 13, 21, 34, 55])
async def test_more_random_scale_downs_lose_no_request(tmp_path: Path, loop: str, seed: int) -> None:
    assert_nothing_lost(await run_load(tmp_path, "--loop", loop, "--seed", seed))


@pytest.fixture
def networks() -> tuple[str, ...]:
    """What a program is run under that makes networks.

    A missing program is a failure. A kernel or a container that lets nobody make networks is not: there, a path that is
    cut is tried by the TCP proxies of the fault tests, and the loopback device must do for the rest.
    """
    assert shutil.which("unshare") and shutil.which("ip"), "install Debian's util-linux and iproute2"
    probe = [*NAMESPACES, "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]
    made = subprocess.run(probe, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no networks can be made here: {made.stderr.strip()}")
    return NAMESPACES


async def test_scale_downs_over_networks_of_their_own_lose_no_request(
    tmp_path: Path, networks: tuple[str, ...]
) -> None:
    seed = secrets.randbelow(1 << 32)
    assert_nothing_lost(await run_load(tmp_path, "--namespaces", "--seed", seed, prefix=networks))


async def test_cable_that_is_pulled_costs_only_what_ran_over_it(tmp_path: Path, networks: tuple[str, ...]) -> None:
    seed = secrets.randbelow(1 << 32)
    found = await run_load(tmp_path, "--namespaces", "--fault", "cut", "--seed", seed, prefix=networks)
    assert found["answered"] == REQUESTS
    assert found["served"] == WORKERS
    assert set(found["lost"]) <= {"transport.disconnected"}
    assert len(found["lost"]) <= SIMULTANEOUS
