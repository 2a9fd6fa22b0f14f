"""Workflows call verbs that exist, pin what they use, and start without permissions."""

import re
from pathlib import Path

import pytest

from dynamo_tools.cli import explain_arguments
from dynamo_tools.gates.agents import command_problem
from dynamo_tools.workspace import Workspace, find_root

ROOT = find_root(Path(__file__).parent)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
STEP = re.compile(r"^\s+run: (?P<command>.+)$", re.MULTILINE)
ALLOWED = re.compile(
    r'(uv run dyn .*|uv publish .*|gh release create .*|\.ci/run|echo "packages=\$\(uv run dyn .*|test "\$BAD" = false)'
)


def commands(path: Path) -> list[str]:
    return STEP.findall(path.read_text(encoding="utf-8"))


def test_there_are_workflows():
    names = {path.stem for path in WORKFLOWS}
    assert names == {"ci", "compat", "docs", "gates", "gpu", "integration", "nightly", "release"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_hold_no_logic(path):
    assert commands(path)
    assert [command for command in commands(path) if not ALLOWED.fullmatch(command)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_verbs_and_flags_exist(path):
    found = [command.split(" > ")[0] for command in commands(path) if command.startswith("uv run dyn")]
    workspace = Workspace(ROOT)
    assert [problem for command in found if (problem := command_problem(workspace, command, explain_arguments))] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_is_permitted_unless_a_job_says_so(path):
    assert "\npermissions: {}\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_hash(path):
    used = re.findall(r"uses: (\S+)", path.read_text(encoding="utf-8"))
    assert [name for name in used if not name.startswith("./") and not re.fullmatch(r".+@[0-9a-f]{40}", name)] == []
    assert [name for name in used if name.startswith("./") and not (ROOT / name / "action.yml").is_file()] == []


def test_continuous_integration_ends_at_the_first_failure():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    steps = re.findall(r'^ *step "uv run dyn ([a-z ]+)" uv run dyn (.+)$', text, re.MULTILINE)
    assert [verb for verb, command in steps if command.startswith(verb)] == [
        "check",
        "semver",
        "release verify",
        "compat",
        "isolate",
        "wheels",
        "readme",
        "docs",
        "imports",
        "stranger",
    ]
