"""What a stranger does, on a small repository whose packages have real tests."""

import pytest

from dynamo_tools import stranger
from dynamo_tools.cli import main
from dynamo_tools.workspace import Workspace

ROUTER = "packages/dynamo-router"
CODE = '''"""Package."""

import dynamo_core

__all__ = ["Router"]


class Router:
    """Routes."""

    def route(self, key: int) -> int:
        """Route."""
        return dynamo_core.answer() + key
'''
TEST = "import dynamo_router\n\n\ndef test_route():\n    assert dynamo_router.Router().route(1) == 43\n"


@pytest.fixture
def repository(clone):
    clone.write(f"{ROUTER}/src/dynamo_router/__init__.py", CODE)
    clone.write(f"{ROUTER}/tests/test_route.py", TEST)
    clone.append(f"{ROUTER}/pyproject.toml", '\n[dependency-groups]\ntest = ["pytest>=8"]\n')
    clone.replace(f"{ROUTER}/pyproject.toml", "dynamo-core>=1.0,<2", "dynamo-core>=1.2,<2")
    clone.write(f"{ROUTER}/README.md", "# Router\n\n```python\nimport dynamo_router\n```\n")
    clone.write("docs/packages/router/index.md", "# Router\n\n<!-- from the sources: readme router -->\n")
    clone.commit("Route")
    return clone


def cloned(repository, tmp_path_factory):
    return stranger.clone(repository.workspace(), tmp_path_factory.mktemp("stranger") / "clone")


@pytest.mark.timeout(240)
def test_a_package_lives_alone_and_its_break_is_named(repository, capsys):
    assert main(["stranger", "--package", "router"]) == 0
    out = capsys.readouterr().out
    assert "installed, tested, built and read" in out
    assert "broken, declared and released" in out


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        (f"{ROUTER}/tests/test_route.py", "== 43", "== 44", "fails its tests"),
        (f"{ROUTER}/README.md", "import dynamo_router", "import dynamo_worker", "its README's example fails"),
        (f"{ROUTER}/pyproject.toml", "dynamo-core>=1.2,<2", "dynamo-core>=1.9,<2", "does not install"),
    ],
)
def test_what_only_works_in_the_workspace_is_found(repository, tmp_path_factory, path, old, new, problem):
    repository.replace(path, old, new)
    repository.commit("Break it")
    workspace = cloned(repository, tmp_path_factory)
    found = list(stranger.alone(workspace, workspace.find("router"), tmp_path_factory.mktemp("alone")))
    assert found
    assert problem in found[0]


def test_a_missing_page_is_found(repository, tmp_path_factory):
    repository.remove("docs/packages/router/index.md")
    repository.commit("Lose the page")
    workspace = cloned(repository, tmp_path_factory)
    folder = tmp_path_factory.mktemp("alone")
    found = list(stranger.alone(workspace, workspace.find("router"), folder, tests=False))
    assert found == ["docs/packages/router/index.md is missing"]


def test_a_public_signature_is_broken(repository):
    package = Workspace(repository.root).find("router")
    assert stranger.break_signature(package) == "dynamo_router.Router.route"
    assert "def route(self, reason: str, key: int) -> int:" in repository.read(
        f"{ROUTER}/src/dynamo_router/__init__.py"
    )


def test_a_package_without_methods_cannot_be_broken(repository):
    with pytest.raises(LookupError, match="no public method"):
        stranger.break_signature(Workspace(repository.root).find("core"))
