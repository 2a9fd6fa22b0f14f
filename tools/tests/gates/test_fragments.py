import argparse

import pytest

from dynamo_tools.gates import fragments
from dynamo_tools.verbs import fragments as verb

INIT = "packages/dynamo-router/src/dynamo_router/__init__.py"


@pytest.fixture
def branch(tree):
    """A branch that left main with everything committed."""
    tree.git("init", "-q", "-b", "main")
    tree.commit("Start")
    tree.git("checkout", "-q", "-b", "topic")
    return tree


def test_the_tree_passes_before_its_first_release(tree):
    assert tree.failures(fragments.check) == []


def test_a_package_without_any_fragment_fails_before_its_first_release(tree):
    tree.remove("packages/dynamo-router/changes/+start.added.md")
    [found] = tree.failures(fragments.check)
    assert "packages/dynamo-router:1: fragments:" in found
    assert "without a fragment" in found


def test_a_source_change_on_a_branch_needs_a_fragment_of_that_branch(branch):
    branch.append(INIT, "_x = 1\n")
    branch.commit("Change")
    [found] = branch.failures(fragments.check)
    assert "1 files changed since main without a fragment" in found
    assert INIT in found
    branch.write("packages/dynamo-router/changes/12.fixed.md", "Answer faster.\n")
    assert branch.failures(fragments.check) == []


def test_an_uncommitted_change_counts(branch):
    branch.append(INIT, "_x = 1\n")
    assert len(branch.failures(fragments.check)) == 1


def test_a_fragment_of_another_package_does_not_count(branch):
    branch.append(INIT, "_x = 1\n")
    branch.write("packages/dynamo-worker/changes/12.fixed.md", "Answer faster.\n")
    assert len(branch.failures(fragments.check)) == 1


def test_changes_since_a_release_need_a_fragment_on_main(tree):
    tree.git("init", "-q", "-b", "main")
    tree.remove("packages/dynamo-router/changes/+start.added.md")
    tree.write("packages/dynamo-router/changes/.gitignore", "!.gitignore\n")
    tree.commit("Start")
    tree.git("tag", "dynamo-router-v0.1.0")
    assert tree.failures(fragments.check) == []
    tree.append(INIT, "_x = 1\n")
    tree.commit("Change")
    [found] = tree.failures(fragments.check)
    assert "changed since dynamo-router-v0.1.0 without a fragment" in found


@pytest.mark.parametrize("name", ["feature.md", "12.feature.md", "slug.added.md", "+Big.added.md", "12.added.txt"])
def test_a_wrong_name_fails(tree, name):
    tree.write(f"packages/dynamo-router/changes/{name}", "Text.\n")
    [found] = tree.failures(fragments.check)
    assert found.startswith(f"packages/dynamo-router/changes/{name}:1: fragments: name must be")


@pytest.mark.parametrize("name", ["12.added.md", "+slug-2.breaking.md", "12.fixed.1.md"])
def test_a_right_name_passes(tree, name):
    tree.write(f"packages/dynamo-router/changes/{name}", "Text.\n")
    assert tree.failures(fragments.check) == []


def test_an_empty_fragment_fails(tree):
    tree.write("packages/dynamo-router/changes/12.added.md", " \n")
    assert "is empty" in tree.failures(fragments.check)[0]


def test_a_changelog_edited_by_hand_fails_and_by_a_release_passes(branch):
    branch.append("packages/dynamo-router/CHANGELOG.md", "More.\n")
    [found] = branch.failures(fragments.check)
    assert "CHANGELOG.md:1: fragments: edited outside a release" in found
    branch.replace("packages/dynamo-router/pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    assert branch.failures(fragments.check) == []


def test_the_verb_prints_what_waits_for_the_next_release(tree, capsys):
    arguments = argparse.Namespace(package=["dynamo-router"])
    assert verb.main(tree.workspace(), arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dynamo-router 0.1.0: 1 wait\n  +start.added.md: ")
    assert "dynamo-worker" not in printed


def test_the_verb_fails_for_the_packages_asked_for_alone(tree, capsys):
    tree.write("packages/dynamo-router/changes/12.wrong.md", "Answer faster.\n")
    assert verb.main(tree.workspace(), argparse.Namespace(package=[])) == 1
    assert "name must be" in capsys.readouterr().out
    assert verb.main(tree.workspace(), argparse.Namespace(package=["dynamo-worker"])) == 0
