"""The page "First answer": each shell block runs, in order, against a `dynamo serve` of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from dynamo_integration_tests.stack import START_LIMIT_S, DynamoProcess

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "first-answer.md"
PRINTED_ADDRESS = "http://127.0.0.1:8000"


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell(script: str, environment: dict[str, str]) -> str:
    beside = Path(sys.executable).parent
    program = f'set -euo pipefail\nuv() {{ shift; "{beside}/$1" "${{@:2}}"; }}\n{script}'  # this environment's own
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=False, timeout=START_LIMIT_S, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_shell_block_does_what_the_page_says(tmp_path: Path) -> None:
    serve, *others = blocks()
    assert serve.strip() == "uv run dynamo serve"
    discovery = f"file://{tmp_path}/discovery"
    with DynamoProcess(["serve", "--http-port", "0", "--discovery", discovery]) as process:
        url = process.wait_for_url()
        environment = {**os.environ, "DYN_OPERATOR_DISCOVERY": discovery}
        asked, looked = (shell(block.replace(PRINTED_ADDRESS, url), environment) for block in others)
        assert json.loads(asked)["choices"][0]["message"]["content"]
        assert "backend.generate" in looked
        assert "dynamo_frontend_requests_total" in looked
        assert process.interrupt() == 0, process.output
