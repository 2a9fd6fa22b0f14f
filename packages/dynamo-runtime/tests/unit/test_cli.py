from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from dynamo_core import plugins
from dynamo_core.component import ComponentContext
from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings
from dynamo_runtime import _cli

LIMIT_S = 30.0


def fail(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert _cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dynamo: error: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["serv"], ["'serv'", "did you mean serve?"]),
        (["xyzzy"], ["'xyzzy'", "dynamo --help"]),
        (["no-such-thing", "--flag"], ["'no-such-thing'"]),
        (["instances", "--discovry", "mem://"], ["--discovry", "dynamo instances --help"]),
        (["instances", "extra"], ["0 arguments, not 1"]),
        (["instances", "--discovery", "nowhere"], ["--discovery", "'nowhere'", "scheme://"]),
        (["call", "only.one.argument"], ["2 arguments, not 1"]),
        (["render", "helm", "graph.yaml"], ["k8s GRAPH.YAML"]),
        (["up"], ["dynamo up graph.yaml"]),
        (["up", "/no/such/graph.yaml"], ["/no/such/graph.yaml", "readable"]),
        (["serve", "--http-prt", "1"], ["--http-prt", "did you mean --http-port?"]),
        (["serve", "--http-port", "many"], ["--http-port", "'many'"]),
        (["serve", "--workers", "0"], ["--workers", "'0'"]),
        (["serve", "/no/such/model"], ["/no/such/model", "model folder"]),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_remedy(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = fail(argv, capsys)
    for part in parts:
        assert part in message


def test_render_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["render", "--help"], ["render", "k8s", "-h"]):
        assert _cli.main(argv) == 0
        assert "usage: dynamo render k8s GRAPH.YAML" in capsys.readouterr().out


def test_a_missing_package_names_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_entry_points", lambda group: ())
    assert "pip install 'dynamo-frontend'" in fail(["frontend", "--http-port", "1"], capsys)


def test_help_and_version_as_a_shell_sees_them() -> None:
    for flag, part in (
        ("--help", "dynamo serve"),
        ("--version", "dynamo-runtime " + metadata.version("dynamo-runtime")),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "dynamo_runtime", flag], capture_output=True, text=True, timeout=LIMIT_S
        )
        assert result.returncode == 0
        assert part in result.stdout


class GreeterSettings(DynamoSettings):
    """Greeter."""

    component = "greeter"

    greeting: str = "hello"


class Greeter:
    """A component that stops its process at once."""

    name = "greeter"
    settings_types: tuple[type[DynamoSettings], ...] = (GreeterSettings,)
    takes_extra_args = False
    made_with: tuple[DynamoSettings, ...] = ()

    def create(self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]) -> Greeter:
        self.made_with = settings
        self._context = context
        return self

    async def start(self) -> None:
        self._context.request_stop("done")

    async def drain(self, timeout_s: float) -> None:
        return None

    async def stop(self) -> None:
        return None


@pytest.fixture
def greeter(monkeypatch: pytest.MonkeyPatch) -> Greeter:
    plugin = Greeter()
    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda kind, name: plugin if name == "greeter" else load(kind, name))
    return plugin


PLANES = ["--discovery", "mem://", "--request-plane", "mem://", "--event-bus", "mem://", "--log-level", "error"]


def test_a_component_takes_its_own_flags_and_those_of_the_runtime(greeter: Greeter) -> None:
    assert _cli.run_component("greeter", [*PLANES, "--greeting", "hi"]) == 0
    assert greeter.made_with == (GreeterSettings(greeting="hi"),)


def test_a_flag_nobody_knows_is_refused(greeter: Greeter) -> None:
    with pytest.raises(ConfigurationError, match=r"--greting.*did you mean --greeting"):
        _cli.run_component("greeter", ["--greting", "hi"])
    assert greeter.made_with == ()


class PluggedIn:
    """An entry point of another distribution."""

    dist = None

    def load(self) -> object:
        return lambda argv: len(argv)


def test_a_command_of_another_package_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def available(kind: str) -> dict[str, object]:
        return {"count": PluggedIn()} if kind == "commands" else {}

    monkeypatch.setattr(plugins, "available", available)
    monkeypatch.setattr(plugins, "load", lambda kind, name: available(kind)[name].load())
    assert _cli.main(["count", "one", "two"]) == 2
