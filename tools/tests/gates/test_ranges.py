import pytest

from dynamo_tools.gates import ranges

ROUTER = "packages/dynamo-router/pyproject.toml"


def test_the_tree_passes(tree):
    assert tree.failures(ranges.check) == []


@pytest.mark.parametrize(
    "wrong", ["dynamo-core", "dynamo-core>=1.0", "dynamo-core==1.2.0", "dynamo-core>=1.0,<3", "dynamo-core>=0.9,<1"]
)
def test_a_wrong_range_of_core_fails(tree, wrong):
    tree.replace(ROUTER, "dynamo-core>=1.0,<2", wrong)
    assert any(found.startswith(f"{ROUTER}:1: ranges: ") for found in tree.failures(ranges.check))


def test_a_range_that_the_workspace_is_outside_of_fails(tree):
    tree.replace(ROUTER, "dynamo-core>=1.0,<2", "dynamo-core>=1.3,<2")
    [found] = tree.failures(ranges.check)
    assert "the workspace has 1.2.0" in found


def test_a_component_without_core_fails(tree):
    tree.replace(ROUTER, '"dynamo-core>=1.0,<2"', "")
    assert "must require dynamo-core exactly once" in tree.failures(ranges.check)[0]


@pytest.mark.parametrize(("old", "new"), [("pytest>=8", "pytest"), ("hatchling>=1.26", "hatchling<2")])
def test_a_requirement_without_a_lower_bound_fails(tree, old, new):
    tree.replace(ROUTER, old, new)
    [found] = tree.failures(ranges.check)
    assert f"{new!r} has no lower bound" in found


def test_an_extra_without_a_lower_bound_fails(tree):
    tree.replace(ROUTER, "[dependency-groups]", '[project.optional-dependencies]\nx = ["numpy"]\n\n[dependency-groups]')
    assert "'numpy' has no lower bound" in tree.failures(ranges.check)[0]


def test_an_extra_may_gather_the_package_s_own_extras(tree):
    extras = (
        '[project.optional-dependencies]\none = ["numpy>=1.26"]\nall = ["dynamo-router[one]"]\n\n[dependency-groups]'
    )
    tree.replace("packages/dynamo-router/pyproject.toml", "[dependency-groups]", extras)
    assert tree.failures(ranges.check) == []
