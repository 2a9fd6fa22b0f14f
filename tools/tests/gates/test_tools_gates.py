"""Gates that run a tool of the environment."""

from dynamo_tools.gates import contracts, deps, lock, ruff, types, workflows

SRC = "packages/dynamo-router/src/dynamo_router/_a.py"


def test_unformatted_code_fails(tree):
    tree.write(SRC, "x  =  1\n")
    assert tree.failures(ruff.check_format) == [f"{SRC}:1: format: is not formatted; run uv run ruff format"]


def test_lint_findings_name_the_rule(tree):
    tree.write(SRC, '"""Module."""\n\nimport json\n')
    [found] = tree.failures(ruff.check_lint)
    assert found.startswith(f"{SRC}:3: lint: F401 ")


def test_a_type_error_fails(tree):
    assert tree.failures(types.check) == []
    tree.write(SRC, '"""Module."""\n\nx: int = "text"\n')
    [found] = tree.failures(types.check)
    assert found.startswith(f"{SRC}:3: types: ")
    assert "reportAssignmentType" in found


def test_a_sibling_import_breaks_a_contract(tree):
    assert tree.failures(contracts.check) == []
    tree.write(SRC, "import dynamo_worker\n")
    [found] = tree.failures(contracts.check)
    assert found.startswith(f"{SRC}:1: contracts: Components know core, never each other")


def test_an_upward_import_breaks_declared_layers(tree):
    tree.append("packages/dynamo-router/pyproject.toml", '\n[tool.dynamo]\nlayers = ["_facade", "_a"]\n')
    tree.write("packages/dynamo-router/src/dynamo_router/_facade.py", "")
    tree.write(SRC, "\nfrom dynamo_router import _facade\n")
    [found] = tree.failures(contracts.check)
    assert found.startswith(f"{SRC}:2: contracts: Layers of dynamo-router")


def test_a_circle_is_reported(tree):
    circles = 'id = "circles"\nname = "No circles"\ntype = "acyclic_siblings"\nancestors = ["dynamo_router"]\n'
    tree.append("pyproject.toml", f"\n[[tool.importlinter.contracts]]\n{circles}")
    tree.append("packages/dynamo-router/pyproject.toml", '\n[tool.dynamo]\nlayers = ["_a | _b"]\n')
    tree.write(SRC, "from dynamo_router import _b\n")
    tree.write("packages/dynamo-router/src/dynamo_router/_b.py", "from dynamo_router import _a\n")
    assert any(
        found.startswith("packages/dynamo-router/src/dynamo_router/_b.py:1: contracts: No circles: ._b -> ._a")
        for found in tree.failures(contracts.check)
    )


def test_a_module_that_no_layer_lists_fails(tree):
    tree.append("packages/dynamo-router/pyproject.toml", '\n[tool.dynamo]\nlayers = ["_facade", "_a"]\n')
    for name in ("_facade", "_a", "_new"):
        tree.write(f"packages/dynamo-router/src/dynamo_router/{name}.py", "")
    [found] = tree.failures(contracts.check)
    assert "dynamo_router._new" in found


def test_several_modules_without_layers_fail(tree):
    for name in ("_facade", "_a"):
        tree.write(f"packages/dynamo-router/src/dynamo_router/{name}.py", "")
    [found] = tree.failures(contracts.check)
    assert found.startswith("packages/dynamo-router/pyproject.toml:1: contracts: declares no [tool.dynamo] layers")


def test_an_undeclared_import_fails(tree):
    assert tree.failures(deps.check) == []
    tree.write(SRC, "import hypothesis\n\nx = hypothesis\n")
    [found] = tree.failures(deps.check)
    assert found.startswith(f"{SRC}:1: deps: DEP00")
    assert "hypothesis" in found


def test_an_unused_dependency_fails(tree):
    tree.replace("packages/dynamo-router/pyproject.toml", '"dynamo-core>=1.0,<2"', '"dynamo-core>=1.0,<2", "attrs>=20"')
    [found] = tree.failures(deps.check)
    assert "DEP002 'attrs'" in found


def test_a_lock_that_does_not_parse_fails(tree):
    [found] = tree.failures(lock.check)
    assert found.startswith("uv.lock:1: lock: ")


def test_a_workflow_that_runs_what_a_stranger_typed_fails(tree):
    assert tree.failures(workflows.check) == []
    echo = "echo ${{ github.event.pull_request.title }}"
    job = f"jobs:\n  a:\n    runs-on: ubuntu-24.04\n    permissions: {{}}\n    steps:\n      - run: {echo}\n"
    tree.write(".github/workflows/a.yml", f"name: a\non: pull_request\npermissions: {{}}\n{job}")
    found = tree.failures(workflows.check)
    assert any(
        line.startswith(".github/workflows/a.yml:9: workflows: ") and "template-injection" in line for line in found
    )
