import pytest

from dynamo_tools.gates import toplevel


def test_the_tree_passes(tree):
    tree.write(".gitignore", "")
    tree.write("towncrier.toml", "")
    assert tree.failures(toplevel.check) == []


def test_a_stranger_at_the_top_fails(tree):
    tree.write("scripts/build.sh", "")
    [found] = tree.failures(toplevel.check)
    assert found.startswith("scripts:1: toplevel: does not belong")


def test_a_missing_part_of_the_root_fails(tree):
    tree.remove("CLAUDE.md")
    assert tree.failures(toplevel.check) == ["CLAUDE.md:1: toplevel: is missing"]


@pytest.mark.parametrize("part", ["AGENTS.md", "LICENSE", "src/dynamo_router/py.typed"])
def test_a_missing_part_of_a_package_fails(tree, part):
    tree.remove(f"packages/dynamo-router/{part}")
    assert tree.failures(toplevel.check) == [f"packages/dynamo-router/{part}:1: toplevel: is missing"]


def test_a_second_import_package_fails(tree):
    tree.write("packages/dynamo-router/src/dynamo/__init__.py", "")
    assert "owns dynamo_router alone" in tree.failures(toplevel.check)[0]


@pytest.mark.parametrize("name", ["utils.py", "_helpers.py", "common.py"])
def test_a_vague_name_fails(tree, name):
    tree.write(f"packages/dynamo-router/src/dynamo_router/{name}", "")
    assert "has a name that says nothing" in tree.failures(toplevel.check)[0]
