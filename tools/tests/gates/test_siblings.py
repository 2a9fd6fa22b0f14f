import pytest

from dynamo_tools.gates import siblings

SRC = "packages/dynamo-router/src/dynamo_router/_a.py"
TEST = "packages/dynamo-router/tests/unit/test_a.py"


def test_the_tree_passes(tree):
    tree.write(SRC, "import dynamo_core.ids\nimport dynamo_router\nimport json\n")
    assert tree.failures(siblings.check) == []


@pytest.mark.parametrize("path", [SRC, TEST, "packages/dynamo-router/examples/a.py"])
@pytest.mark.parametrize(
    "code",
    [
        "import dynamo_worker",
        "from dynamo_worker._engine import Engine",
        "def f():\n    import dynamo_worker.x as y",
        "import importlib\nimportlib.import_module('dynamo_worker')",
        "from importlib import import_module\nimport_module('dynamo_worker.models')",
        "__import__('dynamo_worker')",
        "import pytest\npytest.importorskip('dynamo_worker')",
        "pytest_plugins = ['dynamo_worker.plugin']",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dynamo_worker",
    ],
)
def test_a_sibling_import_fails_anywhere_in_the_package(tree, path, code):
    tree.write(path, code + "\n")
    line = len(code.splitlines())
    [found] = tree.failures(siblings.check)
    assert found.startswith(f"{path}:{line}: siblings: dynamo-router imports dynamo_worker")


def test_core_may_import_no_component(tree):
    tree.write("packages/dynamo-core/src/dynamo_core/a.py", "import dynamo_router\n")
    [found] = tree.failures(siblings.check)
    assert "dynamo-core imports dynamo_router; it may import nothing of the workspace" in found


def test_a_readme_example_may_not_import_a_sibling(tree):
    tree.write("packages/dynamo-router/README.md", "# Router\n\n```python\nimport json\nimport dynamo_worker\n```\n")
    [found] = tree.failures(siblings.check)
    assert found.startswith("packages/dynamo-router/README.md:5: siblings:")


def test_a_readme_example_that_is_no_python_fails(tree):
    tree.write("packages/dynamo-router/README.md", "```python\ndef\n```\n")
    assert "does not parse" in tree.failures(siblings.check)[0]


@pytest.mark.parametrize("old", ['"dynamo-core>=1.0,<2"', '"pytest>=8"'])
def test_a_dependency_on_a_sibling_fails(tree, old):
    tree.replace("packages/dynamo-router/pyproject.toml", old, f'{old}, "dynamo-worker>=0.1"')
    [found] = tree.failures(siblings.check)
    assert "dynamo-router requires dynamo-worker>=0.1" in found
