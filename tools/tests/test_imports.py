import pytest

from dynamo_tools.cli import main
from dynamo_tools.verbs import imports


def test_a_light_package_is_within_its_budget(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree.root)
    assert main(["imports", "--package", "core"]) == 0
    assert "dynamo-core" in capsys.readouterr().out


def test_a_package_over_its_budget_fails(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree.root)
    monkeypatch.setitem(imports.BUDGETS_S, "dynamo-core", 0.0)
    assert main(["imports", "--package", "core", "--runs", "1"]) == 1
    assert "over budget" in capsys.readouterr().out


def test_a_package_that_does_not_import_is_an_error(tree, monkeypatch, capsys):
    broken = tree.workspace().find("core")
    monkeypatch.setattr(type(broken), "import_name", property(lambda self: "dynamo_absent"))
    with pytest.raises(LookupError, match="does not import"):
        imports.median_s(tree.workspace(), broken, 1)


def test_core_has_the_tightest_budget(tree):
    budgets = {package.name: imports.budget_s(package) for package in tree.workspace().packages}
    assert budgets == {"dynamo-core": 0.15, "dynamo-router": 0.4, "dynamo-worker": 0.4}
