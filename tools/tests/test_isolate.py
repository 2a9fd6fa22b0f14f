from pathlib import Path

from dynamo_tools.verbs.isolate import command


def test_tests_run_with_the_package_and_its_test_group_alone(tree):
    workspace = tree.workspace()
    argv = command(workspace, workspace.find("router"), types=False, built=False)
    assert Path(argv[0]).name == "uv"
    assert argv[1:8] == ["run", "--isolated", "--package", "dynamo-router", "--group", "test", "pytest"]
    assert argv[8] == "packages/dynamo-router/tests"


def test_types_of_a_conformance_kit_are_checked_with_its_extra(tree):
    extra = '\n[project.optional-dependencies]\ntesting = ["pytest>=8"]\n'
    tree.append("packages/dynamo-core/pyproject.toml", extra)
    workspace = tree.workspace()
    argv = command(workspace, workspace.find("core"), types=True, built=False)
    assert argv[-4:] == ["--extra", "testing", "pyright", "packages/dynamo-core/src/dynamo_core"]


def test_types_run_with_the_typing_group(tree):
    workspace = tree.workspace()
    argv = command(workspace, workspace.find("dynamo-router"), types=True, built=True)
    assert argv[5:] == ["--group", "typing", "--no-editable", "pyright", "packages/dynamo-router/src/dynamo_router"]
