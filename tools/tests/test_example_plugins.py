"""The example package: installed by pip's rules into an empty environment, found by name, and certified by the kit."""

import shutil
import sys
from pathlib import Path

import pytest

from dynamo_tools.examples import run_code
from dynamo_tools.process import clean_environment, run, tool
from dynamo_tools.wheels import build
from dynamo_tools.workspace import Workspace, find_root

WORKSPACE = Workspace(find_root(Path(__file__)))
SOURCE = WORKSPACE.root / "docs" / "examples" / "dynamo-example-plugins"
TOGETHER = """
import asyncio

from dynamo_core import ModelCard, WorkerId, pack_tokens, plugins
from dynamo_core.routing import RoutingRequest
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm import HostTier
from dynamo_router import KvRouter

router = KvRouter(block_size=16, policy="fewest-requests")
for number in (1, 2):
    router.upsert_worker(WorkerId(number), ModelCard("m", kv_block_size=16))
request = lambda name: RoutingRequest(name, token_ids=pack_tokens(range(64)))
chosen = {asyncio.run(router.select(request(f"r{n}"))).worker for n in range(2)}
assert chosen == {WorkerId(1), WorkerId(2)}, chosen
tier = HostTier(capacity_blocks=1, block_bytes=4, eviction=plugins.load("kv_eviction", "oldest"))
tier.put([BlockDescriptor(sequence_hash=1)], [b"aaaa"])
tier.put([BlockDescriptor(sequence_hash=2)], [b"bbbb"])
with tier.borrow([2]) as views:
    assert [bytes(view) for view in views] == [b"bbbb"]
"""


def environment(folder, *, extra, wheels):
    python = folder / "bin" / "python"
    copied = folder.parent / "dynamo-example-plugins"
    shutil.copytree(SOURCE, copied, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    commands = (
        [tool("uv"), "venv", "--quiet", "--python", sys.executable, str(folder)],
        [tool("uv"), "pip", "install", "--quiet", "--python", str(python), *map(str, wheels), f"{copied}{extra}"],
    )
    for argv in commands:
        result = run(argv, folder.parent, env=clean_environment())
        assert result.returncode == 0, result.text
    return python, copied


@pytest.mark.timeout(240)
def test_it_installs_beside_core_alone_and_is_certified(tmp_path):
    wheels = build(WORKSPACE, [WORKSPACE.find("core")], tmp_path / "wheels")
    python, copied = environment(tmp_path / "env", extra="[test]", wheels=wheels.values())
    argv = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = run(argv, copied, env=clean_environment())
    assert result.returncode == 0, result.text
    assert "skipped" not in result.stdout


@pytest.mark.timeout(240)
def test_its_policy_and_order_work_in_the_packages_that_use_them(tmp_path):
    packages = [WORKSPACE.find(name) for name in ("core", "router", "kvbm")]
    wheels = build(WORKSPACE, packages, tmp_path / "wheels")
    python, _ = environment(tmp_path / "env", extra="", wheels=wheels.values())
    result = run_code(TOGETHER, python)
    assert result.returncode == 0, result.text
