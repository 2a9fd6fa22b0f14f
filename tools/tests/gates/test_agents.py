import pytest

from dynamo_tools.cli import explain_arguments
from dynamo_tools.gates import agents


def failures(tree):
    return [str(found) for found in agents.check(tree.workspace(), explain_arguments)]


@pytest.mark.parametrize(
    "text",
    [
        "`packages/dynamo-router/`",
        "`packages/*/pyproject.toml`",
        "`src/dynamo_router/__init__.py`",
        "`py.typed`",
        "[guide](docs/index.md)",
        "`/v1/models`, `text/event-stream`, `dynamo_core.plugins`, `tcp://host:1`, `packages/dynamo-<name>/x.py`",
        "```sh\nuv run dyn check lengths  # one gate\nuv run pytest packages/dynamo-router/tests\n```",
        "`uv run --isolated --package dynamo-router --group test pytest packages/dynamo-router/tests`",
        "`uv run dyn test --package NAME`",
    ],
)
def test_names_that_exist_pass(tree, text):
    tree.write("AGENTS.md", f"# Guide\n\n{text}\n")
    assert failures(tree) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`packages/dynamo-ruoter/`", "names the path 'packages/dynamo-ruoter/'"),
        ("`_missing.py`", "names the path '_missing.py'"),
        ("[guide](docs/none.md)", "names the path 'docs/none.md'"),
        ("`uv run dyn chekc`", "invalid choice: 'chekc'"),
        ("`uv run dyn check lenghts`", "no gate 'lenghts'"),
        ("`uv run dyn test --pakage X`", "--pakage"),
        ("`uv run pytest packages/dynamo-router/test`", "names the path 'packages/dynamo-router/test'"),
        ("`uv run --package dynamo-ruoter pytest`", "names the package 'dynamo-ruoter'"),
        ("`uv run no-such-command`", "names the command 'no-such-command'"),
    ],
)
def test_a_name_that_does_not_exist_fails(tree, text, problem):
    tree.write("AGENTS.md", f"# Guide\n\nSee {text}.\n")
    [found] = failures(tree)
    assert found.startswith("AGENTS.md:3: agents: ")
    assert problem in found


def test_shell_blocks_are_read_line_by_line(tree):
    tree.write("AGENTS.md", "# Guide\n\n```sh\nuv run dyn check\nuv run dyn nothing\n```\n")
    [found] = failures(tree)
    assert found.startswith("AGENTS.md:5: ")


def test_a_package_guide_names_files_of_its_package(tree):
    tree.write("packages/dynamo-router/src/dynamo_router/_radix.py", "")
    tree.write("packages/dynamo-router/AGENTS.md", "`_radix.py`\n")
    assert failures(tree) == []
    tree.write("packages/dynamo-worker/AGENTS.md", "`_radix.py`\n")
    assert len(failures(tree)) == 1
