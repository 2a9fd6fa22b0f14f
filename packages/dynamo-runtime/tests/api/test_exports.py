from __future__ import annotations

import subprocess
import sys

import pytest

import dynamo_runtime


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert dynamo_runtime.__all__ == sorted(dynamo_runtime.__all__)
    for name in dynamo_runtime.__all__:
        assert getattr(dynamo_runtime, name).__module__.startswith("dynamo_runtime.")


def test_nothing_else_is_public() -> None:
    public = {name for name in vars(dynamo_runtime) if not name.startswith("_")}
    assert public - set(dynamo_runtime.__all__) <= {"TYPE_CHECKING", "Any"}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = dynamo_runtime.Nothing


def test_importing_the_package_does_not_import_what_only_the_host_needs() -> None:
    code = "import sys, dynamo_runtime; print(sorted({'pydantic', 'aiohttp', 'structlog', 'zmq'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == "[]\n"
