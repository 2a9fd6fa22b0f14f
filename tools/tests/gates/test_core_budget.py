import runpy
from pathlib import Path

from dynamo_tools.gates import core_budget
from dynamo_tools.source import code_lines
from dynamo_tools.workspace import Workspace, find_root

MODULE = "packages/dynamo-core/src/dynamo_core/big.py"


def test_comments_blank_lines_and_docstrings_cost_nothing(tree):
    text = '"""Module.\n\nMore.\n"""\n\n# comment\nx = 1\n"""Below an attribute."""\n'
    tree.write(MODULE, text + "# filler\n" * 5000)
    assert tree.failures(core_budget.check) == []


def test_code_over_the_budget_fails(tree):
    tree.write(MODULE, "x = 1\n" * 3000)
    [found] = tree.failures(core_budget.check)
    assert "3003 of 3000 logical lines of code; the largest file is big.py with 3000" in found


def test_the_conformance_kit_is_free(tree):
    tree.write("packages/dynamo-core/src/dynamo_core/testing/kit.py", "x = 1\n" * 4000)
    assert tree.failures(core_budget.check) == []


def test_a_wrapped_statement_is_one_line(tree):
    tree.write(MODULE, "x = [\n" + "    1,\n" * 5000 + "]\n")
    assert tree.failures(core_budget.check) == []


def test_gate_and_the_package_s_own_test_count_the_same():
    workspace = Workspace(find_root(Path(__file__)))
    core = workspace.core
    assert core is not None
    own = runpy.run_path(str(core.tests / "api" / "test_budget.py"))
    assert own["BUDGET_LINES"] == core_budget.CODE_LINES
    for path in workspace.python_files(core.src):
        assert code_lines(path) == own["logical_lines"](path), path.name
