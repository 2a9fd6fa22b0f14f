from dynamo_tools.gates import core_budget

MODULE = "packages/dynamo-core/src/dynamo_core/big.py"


def test_comments_blank_lines_and_docstrings_cost_nothing(tree):
    text = '"""Module.\n\nMore.\n"""\n\n# comment\nx = 1\n"""Below an attribute."""\n'
    tree.write(MODULE, text + "# filler\n" * 5000)
    assert tree.failures(core_budget.check) == []


def test_code_over_the_budget_fails(tree):
    tree.write(MODULE, "x = 1\n" * 3000)
    [found] = tree.failures(core_budget.check)
    assert "3003 of 3000 lines of code; the largest file is big.py with 3000" in found


def test_the_conformance_kit_is_free(tree):
    tree.write("packages/dynamo-core/src/dynamo_core/testing/kit.py", "x = 1\n" * 4000)
    assert tree.failures(core_budget.check) == []
