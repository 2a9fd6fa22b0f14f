"""Releases of a small workspace with two components, from the first one on."""

import pytest

from dynamo_tools.cli import main
from dynamo_tools.releases import releases
from dynamo_tools.releasing import next_version, plan
from dynamo_tools.semver.change import Level

CORE = "packages/dynamo-core"
ROUTER = "packages/dynamo-router"


def release(clone, name):
    assert main(["release", "prepare", name]) == 0
    clone.commit(f"Release {name}")
    assert main(["release", "record", name]) == 0
    clone.commit(f"Record {name}")


@pytest.mark.parametrize(
    ("last", "level", "expected"),
    [
        ("1.2.3", Level.PATCH, "1.2.4"),
        ("1.2.3", Level.MINOR, "1.3.0"),
        ("1.2.3", Level.MAJOR, "2.0.0"),
        ("0.2.3", Level.MAJOR, "0.3.0"),
        ("0.2.3", Level.MINOR, "0.3.0"),
    ],
)
def test_next_version(last, level, expected):
    assert next_version(last, level) == expected


def test_the_first_release_keeps_the_version_of_the_package(clone, capsys):
    assert main(["release", "plan", "core"]) == 0
    assert "dynamo-core: no release -> 1.2.0 (minor), tag dynamo-core-v1.2.0" in capsys.readouterr().out


def test_a_component_waits_for_the_core_it_needs(clone, capsys):
    clone.replace(f"{ROUTER}/pyproject.toml", "dynamo-core>=1.0,<2", "dynamo-core>=1.2,<2")
    clone.commit("Need core 1.2")
    assert main(["release", "plan", "router"]) == 1
    assert "refused: dynamo-router needs dynamo-core 1.2, of which nothing is released" in capsys.readouterr().out
    assert main(["release", "prepare", "router"]) == 2
    release(clone, "core")
    assert main(["release", "plan", "router"]) == 0


@pytest.mark.timeout(180)
def test_a_release_from_plan_to_proof(clone, capsys):
    release(clone, "core")
    clone.replace(f"{CORE}/src/dynamo_core/__init__.py", "def answer() -> int", "def answer(times: int = 1) -> int")
    clone.write(f"{CORE}/changes/12.added.md", "Answer several times.\n")
    clone.commit("Answer several times")
    assert main(["release", "plan", "core"]) == 0
    assert "dynamo-core: 1.2.0 -> 1.3.0 (minor), tag dynamo-core-v1.3.0" in capsys.readouterr().out
    release(clone, "core")
    assert [item.version for item in releases(clone.workspace(), "dynamo-core")] == ["1.2.0", "1.3.0"]
    assert 'version = "1.3.0"' in clone.read(f"{CORE}/pyproject.toml")
    assert 'name = "dynamo-core"\nversion = "1.3.0"' in clone.read("uv.lock")
    assert "times: int = 1" in clone.read(f"{CORE}/api/public.txt")
    capsys.readouterr()
    assert main(["release", "notes", "core"]) == 0
    notes = capsys.readouterr().out
    assert notes.startswith("## 1.3.0 (")
    assert notes.endswith("### Added\n\n- Answer several times. (#12)\n")
    assert main(["release", "verify", "core"]) == 0
    assert capsys.readouterr().out.count(": rebuilds from ") == 2


def test_a_clone_without_tags_finds_every_release(clone):
    release(clone, "core")
    clone.git("tag", "-d", "dynamo-core-v1.2.0")
    assert [item.tag for item in releases(clone.workspace(), "dynamo-core")] == ["dynamo-core-v1.2.0"]
    assert main(["release", "verify", "--tag", "dynamo-core-v1.2.0"]) == 0


def test_nothing_to_say_is_nothing_to_release(clone):
    release(clone, "core")
    workspace = clone.workspace()
    assert plan(workspace, workspace.find("core")).refusals == [
        "dynamo-core has no fragments since 1.2.0; there is nothing to release"
    ]


def test_a_break_that_is_not_declared_is_not_released(clone):
    release(clone, "core")
    clone.replace(f"{CORE}/src/dynamo_core/__init__.py", "def answer() -> int", "def answer() -> str")
    clone.write(f"{CORE}/changes/12.fixed.md", "Answer.\n")
    workspace = clone.workspace()
    [refusal] = plan(workspace, workspace.find("core")).refusals
    assert refusal.startswith("dynamo-core changed more than its fragments declare")


def test_only_a_prepared_and_committed_release_is_recorded(clone, capsys):
    assert main(["release", "record", "core"]) == 2
    assert "says nothing of 1.2.0" in capsys.readouterr().err
    assert main(["release", "prepare", "core"]) == 0
    assert main(["release", "record", "core"]) == 2
    assert "commit the release first" in capsys.readouterr().err
    clone.commit("Release core")
    assert main(["release", "record", "core"]) == 0
    clone.commit("Record core")
    assert main(["release", "record", "core"]) == 2
    assert "is released already" in capsys.readouterr().err


def test_a_record_that_names_the_wrong_commit_is_found(clone, capsys):
    release(clone, "core")
    first = (clone.workspace().git("rev-list", "--max-parents=0", "HEAD") or "").strip()
    recorded = releases(clone.workspace(), "dynamo-core")[0].commit
    clone.replace("releases.toml", recorded, first)
    assert main(["release", "verify", "core"]) == 1
    out = capsys.readouterr().out
    assert f"the tag is at {recorded}, the record says {first}" in out
    assert "the changelog says nothing of it" in out


def test_before_the_first_release_there_is_nothing_to_verify(clone, capsys):
    assert main(["release", "verify"]) == 0
    assert "no release yet" in capsys.readouterr().out
