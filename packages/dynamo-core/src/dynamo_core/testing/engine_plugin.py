"""A pytest plug-in that certifies an engine without a line of test code.

::

    pytest -p dynamo_core.testing.engine_plugin --engine my_package:MyEngine --engine-args="--model tiny"

runs ``EngineConformance`` on the engine. ``--engine`` takes ``module:Attribute`` or the name of an installed engine.
"""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import cast

import pytest

from dynamo_core import plugins
from dynamo_core.engine import EngineFactory
from dynamo_core.errors import ConfigurationError

CHECKS = Path(__file__).with_name("_engine_checks.py")

_chosen: list[tuple[EngineFactory, list[str]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("dynamo", "Dynamo engine conformance")
    group.addoption("--engine", metavar="MODULE:CLASS", help="engine to certify, or the name of an installed one")
    group.addoption("--engine-args", default="", metavar="FLAGS", help="flags for the engine, in one quoted argument")


def pytest_configure(config: pytest.Config) -> None:
    """Put the suite in the place of the tests that would run, unless some were named."""
    name = cast("str | None", config.getoption("--engine"))
    if not name:
        return
    try:
        _chosen[:] = [(load_engine(name), shlex.split(cast("str", config.getoption("--engine-args"))))]
    except (ConfigurationError, ImportError, AttributeError) as error:
        raise pytest.UsageError(f"--engine {name} cannot be loaded: {error}") from error
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []
    config.args.append(str(CHECKS))


def load_engine(name: str) -> EngineFactory:
    """Return the engine's factory.

    Raises:
        ConfigurationError: if no engine of that name is installed.
        ImportError: if the module is not there.
        AttributeError: if the module has no such attribute.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        return cast("EngineFactory", plugins.load("engines", name))
    return cast("EngineFactory", getattr(importlib.import_module(module), attribute))


def chosen_engine() -> tuple[EngineFactory, list[str]]:
    """Return the engine that the command line names, with its flags."""
    if not _chosen:
        raise pytest.UsageError("give --engine MODULE:CLASS")
    return _chosen[0]
