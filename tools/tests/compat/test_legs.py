"""Legs on a small repository whose packages have real tests."""

import pytest

from dynamo_tools.compat.environments import Environments
from dynamo_tools.compat.legs import run_leg
from dynamo_tools.compat.matrix import TestLeg, WireLeg
from dynamo_tools.releases import releases

CORE = "packages/dynamo-core"
TEST = "import dynamo_router\n\n\ndef test_answer():\n    assert dynamo_router.answer() == 42\n"
WIRE = """
class Codec:
    kind = str

    def decode(self, payload):
        return payload.decode("ascii")

    def encode(self, value):
        return value.encode("ascii")


CODECS = {"a.v1": Codec()}
"""
GOLDEN = f"{CORE}/src/dynamo_core/testing/golden/v1"


@pytest.fixture
def repository(clone):
    for name in ("dynamo-core", "dynamo-router"):
        clone.append(f"packages/{name}/pyproject.toml", '\n[dependency-groups]\ntest = ["pytest>=8"]\n')
    clone.write("packages/dynamo-router/tests/test_answer.py", TEST)
    clone.write(f"{CORE}/src/dynamo_core/wire.py", WIRE)
    clone.write(f"{GOLDEN}/a.v1.msgpack", "text")
    for name in ("dynamo-core", "dynamo-router"):
        clone.release(name)
    return clone


def outcome(repository, tmp_path_factory, leg):
    return run_leg(Environments(repository.workspace(), tmp_path_factory.mktemp("compat")), leg)


def release(repository, name):
    return releases(repository.workspace(), name)[-1]


@pytest.mark.timeout(180)
def test_a_new_core_that_deprecates_what_the_last_component_uses_is_no_failure(repository, tmp_path_factory):
    warning = "import warnings\n\nwarnings.warn('use another name', DeprecationWarning)\n"
    repository.append("pyproject.toml", '\n[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n')
    repository.write(
        "packages/dynamo-router/tests/test_answer.py", f"{TEST}\n\ndef test_use():\n    import dynamo_core\n"
    )
    repository.release("dynamo-router", "0.1.1")
    repository.append(f"{CORE}/src/dynamo_core/__init__.py", f"\n{warning}")
    leg = TestLeg("dynamo-router", release(repository, "dynamo-router"), None)
    assert outcome(repository, tmp_path_factory, leg) is None


@pytest.mark.timeout(180)
def test_a_new_core_that_breaks_the_last_component_is_found(repository, tmp_path_factory):
    leg = TestLeg("dynamo-router", release(repository, "dynamo-router"), None)
    assert outcome(repository, tmp_path_factory, leg) is None
    repository.replace(f"{CORE}/src/dynamo_core/__init__.py", "return 42", "return 43")
    repository.replace("packages/dynamo-router/tests/test_answer.py", "== 42", "== 43")
    assert "assert 43 == 42" in outcome(repository, tmp_path_factory, leg)


@pytest.mark.timeout(180)
def test_a_component_that_needs_more_than_the_oldest_core_is_found(repository, tmp_path_factory):
    leg = TestLeg("dynamo-router", None, release(repository, "dynamo-core"))
    assert outcome(repository, tmp_path_factory, leg) is None
    repository.append(f"{CORE}/src/dynamo_core/__init__.py", "\n\ndef question() -> int:\n    return 1\n")
    repository.append("packages/dynamo-router/src/dynamo_router/__init__.py", "\n\ndynamo_core.question()\n")
    assert "no attribute 'question'" in outcome(repository, tmp_path_factory, leg)


@pytest.mark.timeout(180)
def test_a_range_that_shuts_the_other_out_is_found(repository, tmp_path_factory):
    repository.replace("packages/dynamo-router/pyproject.toml", "dynamo-core>=1.0,<2", "dynamo-core>=1.9,<2")
    leg = TestLeg("dynamo-router", None, release(repository, "dynamo-core"))
    assert "dynamo-core" in outcome(repository, tmp_path_factory, leg)


@pytest.mark.timeout(180)
def test_golden_files_are_read_both_ways(repository, tmp_path_factory):
    last = release(repository, "dynamo-core")
    for leg in (WireLeg(last, None), WireLeg(None, last)):
        assert outcome(repository, tmp_path_factory, leg) is None
    repository.write(f"{GOLDEN}/b.v1.msgpack", "text")  # a type that the last release does not know
    assert outcome(repository, tmp_path_factory, WireLeg(None, last)) is None
    repository.replace(f"{CORE}/src/dynamo_core/wire.py", '"a.v1"', '"b.v1"')
    assert "no codec reads ['a.v1']" in outcome(repository, tmp_path_factory, WireLeg(last, None))


@pytest.mark.timeout(180)
def test_a_golden_file_that_the_last_release_cannot_read_is_found(repository, tmp_path_factory):
    (repository.root / GOLDEN / "a.v1.msgpack").write_bytes(b"\xff")
    assert "UnicodeDecodeError" in outcome(
        repository, tmp_path_factory, WireLeg(None, release(repository, "dynamo-core"))
    )
