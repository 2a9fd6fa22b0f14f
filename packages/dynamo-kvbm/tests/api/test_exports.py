import subprocess
import sys

import pytest

import dynamo_kvbm
from dynamo_kvbm import connector_sdk


def test_all_is_sorted_and_every_name_is_there() -> None:
    for module in (dynamo_kvbm, connector_sdk):
        assert list(module.__all__) == sorted(module.__all__)
        assert all(getattr(module, name) is not None for name in module.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonesuch"):
        dynamo_kvbm.nonesuch  # noqa: B018 - the look-up is the test


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, dynamo_kvbm; print({'numpy', 'pydantic', 'prometheus_client'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"
