from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_core.planning import ScalingTarget
from dynamo_core.testing import ScalingTargetConformance
from dynamo_planner._targets.command import CommandTarget

SCRIPT = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
pools = json.loads(path.read_text())
for change in sys.argv[2:]:
    role, count = change.split("=")
    pools[role] = {"ready": int(count), "desired": int(count)}
path.write_text(json.dumps(pools))
print(json.dumps(pools))
"""


def target(folder: Path, replicas: Mapping[str, int]) -> CommandTarget:
    script, pools = folder / "pools.py", folder / "pools.json"
    script.write_text(SCRIPT)
    pools.write_text(json.dumps({role: {"ready": count, "desired": count} for role, count in replicas.items()}))
    command = [sys.executable, str(script), str(pools)]
    return CommandTarget(command, command)


class TestCommand(ScalingTargetConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    async def make_target(self, replicas: Mapping[str, int]) -> ScalingTarget:
        return target(self.folder, replicas)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "status 3"),
        ("print('nonsense')", "printed no pools"),
        ("import time; time.sleep(600)", "took more than"),
    ],
)
async def test_a_command_that_fails_is_a_target_out_of_reach(code: str, message: str) -> None:
    broken = CommandTarget([sys.executable, "-c", code], ["true"], timeout_s=1.0)
    with pytest.raises(UnavailableError, match=message):
        await broken.state()


async def test_a_command_that_is_not_there_says_so() -> None:
    with pytest.raises(UnavailableError, match="cannot be run"):
        await CommandTarget(["/no/such/command"], ["true"]).state()


def test_the_plug_in_refuses_options_by_name() -> None:
    make = plugins.load("scaling_targets", "command")
    context = cast("Any", None)
    assert isinstance(make(context, {"state": ["a"], "scale": ["b"], "timeout_s": 5}), CommandTarget)
    for options in ({}, {"state": "a", "scale": ["b"]}, {"state": [], "scale": ["b"]}, {"state": ["a"], "scal": ["b"]}):
        with pytest.raises(ConfigurationError, match="target 'command'"):
            make(context, options)
