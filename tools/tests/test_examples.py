import sys
from pathlib import Path

from dynamo_tools.examples import run_blocks
from dynamo_tools.source import python_blocks

TEXT = "# Title\n\n```python\nprint('one')\n```\n\n```sh\nexit 1\n```\n\n```python\nraise SystemExit('two')\n```\n"


def test_blocks_run_in_order_each_on_its_own(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TEXT, encoding="utf-8")
    assert [line for line, _ in python_blocks(path)] == [4, 12]
    first, second = run_blocks(path, Path(sys.executable))
    assert (first.result.returncode, first.result.stdout) == (0, "one\n")
    assert (second.line, second.result.returncode, second.result.stderr) == (12, 1, "two\n")


def test_a_warning_fails_an_example(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("```python\nimport warnings\nwarnings.warn('old')\n```\n", encoding="utf-8")
    assert run_blocks(path, Path(sys.executable))[0].result.returncode == 1
