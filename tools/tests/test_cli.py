import pytest

from dynamo_tools.cli import VERBS, main


def test_findings_are_lines_and_the_status_is_1(tree, monkeypatch, capsys):
    tree.write("scripts/a.sh", "")
    monkeypatch.chdir(tree.root / "packages")
    assert main(["check", "toplevel", "--quiet"]) == 1
    assert capsys.readouterr().out == (
        "scripts:1: toplevel: does not belong at the top level; move it into a member or docs/\n"
    )


def test_a_clean_tree_has_status_0_and_a_table_of_seconds(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree.root)
    assert main(["check", "toplevel", "ranges"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["ranges", "ok"], ["toplevel", "ok"]]


def test_notes_do_not_fail(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree.root)
    assert main(["check", "core-budget"]) == 0
    assert "core-budget: note: " in capsys.readouterr().out


def test_a_wrong_gate_exits_2_and_lists_the_gates(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree.root)
    with pytest.raises(SystemExit) as caught:
        main(["check", "lenghts"])
    assert caught.value.code == 2
    assert "no gate 'lenghts'; there are agents, contracts" in capsys.readouterr().err


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check"]) == 2
    assert "is not inside the workspace" in capsys.readouterr().err


def test_a_wrong_package_exits_2_and_lists_the_packages(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree.root)
    assert main(["isolate", "--package", "ruoter"]) == 2
    assert "no package 'ruoter'; there are dynamo-core, dynamo-router, dynamo-worker" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.NAME)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb.NAME, "--help"])
    assert caught.value.code == 0
    assert f"usage: dyn {verb.NAME}" in capsys.readouterr().out
