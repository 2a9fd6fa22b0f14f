import subprocess
import sys

import pytest

import dynamo_router


def test_exports_are_sorted_and_importable():
    assert dynamo_router.__all__ == sorted(dynamo_router.__all__)
    for name in dynamo_router.__all__:
        assert getattr(dynamo_router, name).__module__.startswith("dynamo_router.")


def test_nothing_else_is_public():
    public = {name for name in vars(dynamo_router) if not name.startswith("_")}
    assert public - set(dynamo_router.__all__) <= {"TYPE_CHECKING", "Any"}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = dynamo_router.Nothing


def test_a_policy_plug_in_does_not_wait_for_what_only_a_router_needs():
    code = "import sys; from dynamo_router import Candidate, Policy, Query; print(sorted({%s} & set(sys.modules)))"
    heavy = "'pydantic', 'aiohttp', 'structlog', 'zmq', 'prometheus_client'"
    result = subprocess.run(
        [sys.executable, "-c", code % heavy], capture_output=True, text=True, timeout=30, check=True
    )
    assert result.stdout == "[]\n"
