"""A block manager fetches blocks from the host tier of another process, and does without when that one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from dynamo_core.clock import SystemClock
from dynamo_core.enums import Tier
from dynamo_core.kv import BlockLayout
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import DeviceBlocks
from dynamo_integration_tests.stack import wait_until
from dynamo_kvbm import KvbmConnector, create_connector

LAYOUT = BlockLayout(num_layers=2, block_size=16, kv_heads=4, head_dim=64)
HASHES = [11, 12, 13]

OTHER_WORKER = """
import sys
from dynamo_core.clock import SystemClock
from dynamo_core.kv import BlockDescriptor, BlockLayout
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import DeviceBlocks
from dynamo_kvbm import create_connector

layout = BlockLayout(num_layers=2, block_size=16, kv_heads=4, head_dim=64)
options = {"host_blocks": 8, "model": "m@1", "peer_discovery": sys.argv[1]}
connector = create_connector(options=options, clock=SystemClock(), metrics=Metrics())
device = DeviceBlocks(layout)
device.blocks = {i: bytes([i]) * layout.block_bytes for i in range(3)}
connector.start(device, lambda change: None)
connector.on_evict([BlockDescriptor(11), BlockDescriptor(12, 0, 11, 1), BlockDescriptor(13, 0, 12, 2)], [0, 1, 2])
print("ready", flush=True)
sys.stdin.read()
"""


def connector(discovery: str, device: DeviceBlocks) -> KvbmConnector:
    options = {"host_blocks": 8, "model": "m@1", "peer_discovery": discovery, "peer_timeout_s": 10.0}
    made = create_connector(options=options, clock=SystemClock(), metrics=Metrics())
    made.start(device, lambda change: None)
    return made


def test_blocks_come_from_another_process_until_it_is_killed(tmp_path: Path) -> None:
    discovery = f"file://{tmp_path}"
    device = DeviceBlocks(LAYOUT)
    ours = connector(discovery, device)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_WORKER, discovery],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert "ready\n" in iter(other.stdout.readline, "")
        wait_until(lambda: ours.match(HASHES).blocks == 3, "sight of the peer's blocks")
        assert ours.match(HASHES).tiers == (Tier.EXTERNAL,) * 3
        assert ours.onboard(HASHES[:2], [7, 8]) == 2
        assert [device.blocks[7], device.blocks[8]] == [bytes([i]) * LAYOUT.block_bytes for i in range(2)]
        os.kill(other.pid, signal.SIGKILL)
        other.wait(30)
    assert ours.onboard(HASHES, [4, 5, 6]) == 2, "what came before is in the own host tier; the rest is a miss"
    wait_until(lambda: ours.match(HASHES).blocks == 2, "end of the dead peer's blocks")
    assert ours.match(HASHES).tiers == (Tier.HOST, Tier.HOST)
    ours.close()
