from pathlib import Path

import pytest

from dynamo_tools import site
from dynamo_tools.workspace import Workspace, find_root

WORKSPACE = Workspace(find_root(Path(__file__)))
MOST = {
    "dynamo-core": 14,
    "dynamo-runtime": 32,
    "dynamo-router": 26,
    "dynamo-kvbm": 17,
    "dynamo-planner": 25,
    "dynamo-frontend": 35,
    "dynamo-worker": 18,
}
"""Most distributions that installing a package may bring; raise one only for a dependency that was decided on."""


@pytest.mark.parametrize("name", MOST)
def test_a_package_brings_no_more_than_was_decided(name):
    found = site.transitive(WORKSPACE)[name]
    assert len(found) <= MOST[name], sorted(found)


def test_every_package_is_bounded():
    assert {package.name for package in WORKSPACE.packages} == set(MOST)


def test_the_closure_follows_the_lock(tree):
    tree.write(
        "uv.lock",
        '[[package]]\nname = "dynamo-core"\ndependencies = [{ name = "a" }]\n\n[[package]]\nname = "a"\n'
        'dependencies = [{ name = "b" }]\n\n[[package]]\nname = "b"\ndependencies = [{ name = "a" }]\n',
    )
    assert site.transitive(tree.workspace())["dynamo-core"] == {"a", "b"}


def test_options_and_metrics_are_filled_in():
    text = site.expand(
        "<!-- from the sources: settings router -->\n\n<!-- from the sources: metrics router -->", WORKSPACE
    )
    assert "| `--policy`<br>`DYN_ROUTER_POLICY` |" in text
    assert "| `dynamo_router_decisions_total` | counter | `model`, `policy` |" in text


def test_the_design_lists_modules_by_layer(tree):
    source = "packages/dynamo-router/src/dynamo_router"
    tree.append("packages/dynamo-router/pyproject.toml", '\n[tool.dynamo]\nlayers = ["_top", "_a | _part"]\n')
    for name in ("_top.py", "_a.py", "_part/__init__.py"):
        tree.write(f"{source}/{name}", f'"""What ``{name}`` holds,\nin two lines.\n\nMore.\n"""\n')
    lines = site.expand("<!-- from the sources: design router -->", tree.workspace()).splitlines()
    assert lines[2:] == [
        "| 2 | `_top` | What `_top.py` holds, in two lines. |",
        "| 1 | `_a` | What `_a.py` holds, in two lines. |",
        "| 1 | `_part` | What `_part/__init__.py` holds, in two lines. |",
    ]


@pytest.mark.parametrize("package", WORKSPACE.packages, ids=lambda package: package.name)
def test_every_package_page_has_the_sections_of_the_template(package):
    folder = WORKSPACE.root / "docs" / "packages" / package.name.removeprefix("dynamo-")
    headings = [line[3:] for line in (folder / "index.md").read_text().splitlines() if line.startswith("## ")]
    wanted = ["Overview", "Design", "Errors", "Extension points", "Testing", "Compatibility"]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert {path.name for path in folder.glob("*.md")} >= {"index.md", "configuration.md", "api.md"}


def test_the_errors_of_a_component_are_those_it_raises():
    text = site.expand("<!-- from the sources: errors worker -->", WORKSPACE)
    assert "| `CapacityExhaustedError` | 529 |" in text
    assert "UnauthenticatedError" not in text


def test_a_readme_loses_its_title_and_its_links_into_the_repository(tree):
    tree.write(
        "packages/dynamo-core/README.md",
        "# Core\n\n## Use\n\nSee [it](a.md) and [that](https://x.y).\n\n```sh\n# x\n```\n",
    )
    text = site.expand("<!-- from the sources: readme core -->", tree.workspace())
    assert text.strip() == "### Use\n\nSee it and [that](https://x.y).\n\n```sh\n# x\n```"


def test_the_changelog_of_a_package_without_a_release_says_so(tree):
    tree.write("packages/dynamo-core/CHANGELOG.md", "# Changelog\n\n<!-- towncrier release notes start -->\n")
    assert site.expand("<!-- from the sources: changelog core -->", tree.workspace()) == "Nothing is released yet."


def test_a_page_that_asks_for_the_unknown_fails():
    with pytest.raises(LookupError, match="a page asks for 'colours'"):
        site.expand("<!-- from the sources: colours core -->", WORKSPACE)


def test_every_kind_of_plugin_is_listed_with_what_is_built_in():
    text = site.expand("<!-- from the sources: kinds -->", WORKSPACE)
    assert "| `dynamo_core.routers` |" in text
    assert "`round-robin`" in text


def test_pages_ask_no_other_host_for_anything():
    config = (WORKSPACE.root / "mkdocs.yml").read_text()
    assert "font: false" in config
    assert "mermaid" not in config
    assert [path for path in (WORKSPACE.root / "docs").rglob("*.md") if "```mermaid" in path.read_text()] == []
