"""The pages of the HTTP APIs: each shell block runs as it stands, against a `dynamo serve` of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_integration_tests.stack import DynamoProcess

FOLDER = Path(__file__).parents[2] / "docs" / "packages" / "frontend" / "apis"
_SERVE = "uv run dynamo serve\n"


def blocks(page: Path) -> list[str]:
    found = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in found if not block.endswith(_SERVE)]


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """Printed addresses, and those of the running deployment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with DynamoProcess(["serve", "--http-port", "0"], {"DYN_FRONTEND_KSERVE_GRPC_PORT": port}) as serve:
        yield {"http://127.0.0.1:8000": serve.wait_for_url(), "127.0.0.1:8001": f"127.0.0.1:{port}"}
        assert serve.interrupt() == 0, serve.output


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.md")))
def test_every_block_runs(name: str, addresses: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    found = blocks(FOLDER / f"{name}.md")
    assert found
    for block in found:
        script = block.replace("/tmp/", f"{tmp_path}/")
        for printed, actual in addresses.items():
            script = script.replace(printed, actual)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
            env=environment,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), block
