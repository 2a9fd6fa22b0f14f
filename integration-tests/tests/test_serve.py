"""`dynamo serve` as a person runs it: one process or several, stopped with Ctrl-C while it works."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from dynamo_integration_tests.stack import DynamoProcess, component_pids, descendants

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def answer(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        chat = client.chat.completions.create(model="tinylm", messages=QUESTION, temperature=0)
    return chat.choices[0].message.content or ""


@pytest.mark.parametrize("router", ["kv", "round-robin"])
def test_everything_in_one_process(router: str) -> None:
    with DynamoProcess(["serve", "--in-process", "--http-port", "0", "--router", router]) as serve:
        url = serve.wait_for_url()
        assert descendants(serve.pid) == []
        assert "Tokyo" in answer(url)
        assert serve.interrupt() == 0, serve.output


@pytest.mark.parametrize("mode", [["--in-process"], []], ids=["in-process", "processes"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_a_running_stream_end(mode: list[str], signum: signal.Signals) -> None:
    with DynamoProcess(["serve", "--http-port", "0", *mode]) as serve:
        url = serve.wait_for_url()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = client.completions.create(
                model="tinylm",
                prompt="In the beginning",
                temperature=0,
                max_tokens=250,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            chunks = [next(stream)]
            serve.send_signal(signum)
            chunks += list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 250
        assert serve.wait() == 0, serve.output


def test_the_screen_names_what_one_needs_and_its_curl_line_works() -> None:
    with DynamoProcess(["serve", "--http-port", "0"]) as serve:
        url = serve.wait_for_url()
        serve.wait_for("Ctrl-C")
        lines = serve.output.splitlines()
        [curl] = [line.split(maxsplit=1)[1] for line in lines if line.strip().startswith("Try")]
        result = subprocess.run(["bash", "-c", f"{curl} -s"], capture_output=True, text=True, timeout=30)
        assert "Tokyo" in result.stdout
        [metrics] = [line.split()[1] for line in lines if line.strip().startswith("Metrics")]
        assert "dynamo_frontend_requests_total" in httpx.get(metrics).text
        assert httpx.get(f"{url}/ready").status_code == 200
        assert len(component_pids(serve.pid, "worker")) == 2
        assert len(lines) <= 25
        assert serve.interrupt() == 0, serve.output


def test_a_missing_package_is_named_with_its_remedy() -> None:
    """The runtime alone, in an environment with nothing but itself and core."""
    root = Path(__file__).resolve().parents[2]
    command = ["uv", "run", "--quiet", "--isolated", "--no-dev", "--package", "dynamo-runtime"]
    result = subprocess.run(
        [*command, "dynamo", "frontend"], cwd=root, capture_output=True, text=True, timeout=55, stdin=subprocess.DEVNULL
    )
    output = (result.stdout + result.stderr).strip()
    assert result.returncode == 2, output
    assert "pip install" in output
    assert "dynamo-frontend" in output
    assert len(output.splitlines()) == 1, output


def test_the_module_and_the_script_are_the_same_command() -> None:
    outputs = [
        subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        for command in (["dynamo", "--version"], [sys.executable, "-m", "dynamo_runtime", "--version"])
    ]
    assert outputs[0] == outputs[1]
    assert "dynamo-frontend" in outputs[0]
