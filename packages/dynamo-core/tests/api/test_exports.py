"""The public surface is what ``__all__`` says, and importing it is cheap."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import dynamo_core

PACKAGES = ("dynamo_core", "dynamo_core.memory", "dynamo_core.noop", "dynamo_core.testing")
HEAVY = (
    "pydantic",
    "pydantic_settings",
    "prometheus_client",
    "yaml",
    "structlog",
    "opentelemetry",
    "hypothesis",
    "pytest",
)


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_sorted_and_complete(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        key for key, value in vars(module).items() if not key.startswith("_") and not isinstance(value, ModuleType)
    }
    public -= {"TYPE_CHECKING", "Any"}
    assert module.__all__ == sorted(module.__all__)
    assert public | {"DynamoSettings"} == set(module.__all__) | {"DynamoSettings"}
    for key in module.__all__:
        assert getattr(module, key) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        dynamo_core.no_such_name  # noqa: B018 - the access is what is tested


def test_every_module_imports_and_says_what_it_is_for() -> None:
    for info in pkgutil.walk_packages(dynamo_core.__path__, "dynamo_core."):
        if not info.name.endswith("__main__"):
            assert importlib.import_module(info.name).__doc__, info.name


def test_importing_the_contracts_loads_nothing_heavy() -> None:
    contracts = "dynamo_core, dynamo_core.engine, dynamo_core.routing, dynamo_core.planning, dynamo_core.wire"
    code = f"import sys, {contracts}; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_settings_are_reached_through_the_package() -> None:
    from dynamo_core.settings import DynamoSettings

    assert dynamo_core.DynamoSettings is DynamoSettings
