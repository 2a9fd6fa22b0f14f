import json

import pytest

from dynamo_tools.affected import affected_members, dependents
from dynamo_tools.cli import main

LOCK = """
[[package]]
name = "dynamo-core"

[[package]]
name = "dynamo-router"
dependencies = [{ name = "dynamo-core" }, { name = "numpy" }]

[[package]]
name = "dynamo-worker"
dependencies = [{ name = "dynamo-core" }]

[[package]]
name = "numpy"
"""
ALL = {"dynamo-core", "dynamo-router", "dynamo-worker"}


@pytest.fixture
def locked(tree):
    tree.write("uv.lock", LOCK)
    return tree


def test_the_graph_comes_from_the_lock(locked):
    assert dependents(locked.workspace())["dynamo-core"] == {"dynamo-router", "dynamo-worker"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("packages/dynamo-router/src/dynamo_router/_a.py", {"dynamo-router"}),
        ("packages/dynamo-core/src/dynamo_core/ids.py", ALL),
        ("pyproject.toml", ALL),
        ("docs/index.md", set()),
        ("README.md", set()),
    ],
)
def test_a_change_touches_its_package_and_those_that_need_it(locked, changed, expected):
    assert affected_members(locked.workspace(), [changed]) == expected


def test_a_folder_that_nobody_owns_is_refused(locked):
    with pytest.raises(LookupError, match="belongs to no member"):
        affected_members(locked.workspace(), ["packages/dynamo-new/a.py"])


def test_the_command_prints_what_a_branch_touches(locked, monkeypatch, capsys):
    locked.git("init", "-q", "-b", "main")
    locked.commit("Start")
    monkeypatch.chdir(locked.root)
    assert main(["affected"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == ALL
    locked.git("checkout", "-q", "-b", "topic")
    locked.write("packages/dynamo-router/tests/unit/test_a.py", "x = 1\n")
    locked.commit("Change")
    assert main(["affected"]) == 0
    assert json.loads(capsys.readouterr().out) == ["dynamo-router"]
