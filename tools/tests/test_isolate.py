from pathlib import Path

from dynamo_tools.verbs.isolate import command


def test_tests_run_with_the_package_and_its_test_group_alone(tree):
    workspace = tree.workspace()
    argv = command(workspace, workspace.find("router"), types=False, built=False)
    assert Path(argv[0]).name == "uv"
    assert argv[1:8] == ["run", "--isolated", "--package", "dynamo-router", "--group", "test", "pytest"]
    assert argv[8] == "packages/dynamo-router/tests"


def test_types_run_with_the_typing_group(tree):
    workspace = tree.workspace()
    argv = command(workspace, workspace.find("dynamo-router"), types=True, built=True)
    assert argv[5:] == ["--group", "typing", "--no-editable", "pyright", "packages/dynamo-router/src/dynamo_router"]
