import pytest

from dynamo_tools.compat.matrix import ClusterLeg, TestLeg, WireLeg, legs
from dynamo_tools.verbs import compat

ALL = ("dynamo-frontend", "dynamo-planner", "dynamo-router", "dynamo-runtime", "dynamo-worker")


@pytest.fixture
def fleet(released):
    """Every package that a cluster needs, released."""
    for name in set(ALL) - {"dynamo-router", "dynamo-worker"}:
        released.package(name, "0.1.0", '"dynamo-core>=1.0,<2"')
        released.release(name)
    return released


def test_before_the_first_release_there_are_no_legs(tree, capsys, monkeypatch):
    from dynamo_tools.cli import main

    assert legs(tree.workspace()) == []
    monkeypatch.chdir(tree.root)
    assert main(["compat"]) == 0
    assert capsys.readouterr().out == "compat: no release yet, so nothing to be compatible with\n"


def test_tests_of_the_last_release_run_on_the_new_core_and_new_tests_on_the_oldest_core(released):
    released.release("dynamo-core", "1.3.0")
    names = [str(leg) for leg in legs(released.workspace()) if isinstance(leg, TestLeg) and "router" in str(leg)]
    assert names == [
        "tests of dynamo-router 0.1.0 on dynamo-core checkout",
        "tests of dynamo-router checkout on dynamo-core 1.2.0",
    ]


def test_the_oldest_core_follows_the_range(released):
    released.release("dynamo-core", "1.3.0")
    released.replace("packages/dynamo-router/pyproject.toml", "dynamo-core>=1.0,<2", "dynamo-core>=1.3,<2")
    assert "tests of dynamo-router checkout on dynamo-core 1.3.0" in map(str, legs(released.workspace()))


def test_a_checkout_that_is_its_last_release_is_tried_with_the_one_before(released):
    released.release("dynamo-core", "1.3.0")
    assert "golden files of dynamo-core 1.2.0 read by checkout" in map(str, legs(released.workspace()))
    released.write("packages/dynamo-core/changes/+more.added.md", "More.\n")
    names = [str(leg) for leg in legs(released.workspace()) if isinstance(leg, WireLeg)]
    assert "golden files of dynamo-core 1.3.0 read by checkout" in names


def test_golden_files_go_both_ways(released):
    assert [str(leg) for leg in legs(released.workspace()) if isinstance(leg, WireLeg)] == [
        "golden files of dynamo-core 1.2.0 read by checkout",
        "golden files of dynamo-core checkout read by 1.2.0",
    ]


def test_a_cluster_needs_a_release_of_all_its_parts(released):
    assert [leg for leg in legs(released.workspace()) if isinstance(leg, ClusterLeg)] == []


def test_clusters_mix_each_part(fleet):
    found = {leg.name: leg for leg in legs(fleet.workspace()) if isinstance(leg, ClusterLeg)}
    assert set(found) == {
        "old frontend, new workers",
        "new frontend, old workers",
        "new frontend, one old and one new worker",
        "old router in a new frontend",
        "new router in an old frontend, old workers",
        "old planner, new supervisor",
        "new planner, old supervisor",
    }
    mixed = dict(found["old router in a new frontend"].frontend)
    assert mixed["dynamo-frontend"] is None
    assert mixed["dynamo-router"].version == "0.1.0"


def test_the_list_runs_nothing(fleet, capsys, monkeypatch):
    from dynamo_tools.cli import main

    monkeypatch.chdir(fleet.root)
    assert main(["compat", "--list", "--only", "cluster"]) == 0
    assert capsys.readouterr().out.count("cluster: ") == 7
    assert set(compat.KINDS) == {"tests", "wire", "cluster"}
