from __future__ import annotations

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import resolve_settings
from dynamo_runtime._settings import OperatorSettings, RuntimeSettings, ServeSettings, SupervisorSettings

KINDS = (RuntimeSettings, ServeSettings, SupervisorSettings)


def test_all_options_of_one_command_line_have_different_names() -> None:
    resolved = resolve_settings("dynamo serve", KINDS, [], environ={})
    assert resolved.get(RuntimeSettings).namespace == "dynamo"
    assert resolved.get(ServeSettings).workers == 2


@pytest.mark.parametrize("kind", [*KINDS, OperatorSettings])
def test_every_option_is_described(kind: type) -> None:
    assert all(field.description for field in kind.model_fields.values())


def test_the_default_discovery_is_this_users_own() -> None:
    first, second = RuntimeSettings().discovery, RuntimeSettings().discovery
    assert first == second
    assert first.startswith("file:///")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--namespace", "a.b"], "--namespace"),
        (["--discovery", "etcd"], "is no URL"),
        (["--status-port", "-2"], "--status-port"),
        (["--drain-timeout-s", "-1"], "--drain-timeout-s"),
        (["--trace-sample-ratio", "2"], "--trace-sample-ratio"),
        (["--log-level", "loud"], "--log-level"),
    ],
)
def test_values_out_of_range_name_the_option(argv: list[str], part: str) -> None:
    with pytest.raises(ConfigurationError, match=part):
        resolve_settings("dynamo worker", (RuntimeSettings,), argv, environ={})


def test_the_environment_sets_options() -> None:
    environ = {"DYN_RUNTIME_NAMESPACE": "blue", "DYN_SUPERVISOR_MAX_REPLICAS": "3"}
    resolved = resolve_settings("dynamo serve", KINDS, [], environ=environ)
    assert resolved.get(RuntimeSettings).namespace == "blue"
    assert resolved.get(SupervisorSettings).max_replicas == 3
