import zipfile

import pytest

from dynamo_tools.verbs.wheels import released
from dynamo_tools.wheels import SIZE_LIMIT_BYTES, Trial, build, inspect, try_out

GOOD = ("dynamo_router/__init__.py", "dynamo_router/py.typed", "dynamo_router-0.1.0.dist-info/licenses/LICENSE")


def wheel(folder, names, size=0):
    path = folder / "dynamo_router-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x" * size)
    return path


def problems(tree, names, size=0):
    return list(inspect(tree.workspace().find("router"), wheel(tree.root, names, size)))


def test_a_good_wheel_passes(tree):
    assert problems(tree, GOOD) == []


@pytest.mark.parametrize(("missing", "problem"), [(GOOD[1], "has no py.typed"), (GOOD[2], "has no LICENSE")])
def test_a_missing_part_is_reported(tree, missing, problem):
    [found] = problems(tree, [name for name in GOOD if name != missing])
    assert problem in found


@pytest.mark.parametrize("name", ["dynamo_router/tests/test_a.py", "dynamo_router/conftest.py"])
def test_tests_do_not_ship(tree, name):
    [found] = problems(tree, [*GOOD, name])
    assert f"ships the test file {name}" in found


def test_a_second_top_level_package_is_reported(tree):
    [found] = problems(tree, [*GOOD, "dynamo/__init__.py"])
    assert "installs dynamo besides dynamo_router" in found


def test_a_large_wheel_is_reported(tree):
    assert f"over {SIZE_LIMIT_BYTES}" in problems(tree, GOOD, SIZE_LIMIT_BYTES)[0]


@pytest.fixture
def buildable(tree):
    for name in ("core", "router"):
        license_file = 'version = "0.1.0"\nlicense-files = ["LICENSE"]'
        pyproject = f"packages/dynamo-{name}/pyproject.toml"
        if name == "router":
            tree.replace(pyproject, 'version = "0.1.0"', license_file)
        tree.append(pyproject, f'\n[tool.hatch.build.targets.wheel]\npackages = ["src/dynamo_{name}"]\n')
    return tree


def test_a_package_is_built_and_its_example_runs_with_core_alone(buildable, tmp_path):
    workspace = buildable.workspace()
    router = workspace.find("router")
    buildable.write(
        "packages/dynamo-router/README.md", "```python\nimport dynamo_router\ndynamo_router.answer()\n```\n"
    )
    wheels = build(workspace, workspace.packages[:2], tmp_path / "wheels")
    assert list(inspect(router, wheels["dynamo-router"])) == []
    assert try_out(workspace, router, wheels, tmp_path / "good", Trial()) is None
    buildable.write("packages/dynamo-router/README.md", "```python\nimport dynamo_worker\n```\n")
    problem = try_out(workspace, router, wheels, tmp_path / "bad", Trial())
    assert problem is not None
    assert "README.md line 2 fails" in problem
    assert "No module named 'dynamo_worker'" in problem


def test_a_release_tag_names_a_package_and_its_version(tree):
    workspace = tree.workspace()
    assert released(workspace, "dynamo-router-v0.1.0").name == "dynamo-router"
    with pytest.raises(LookupError, match=r"names version '0\.2\.0'; dynamo-router has 0\.1\.0"):
        released(workspace, "dynamo-router-v0.2.0")
