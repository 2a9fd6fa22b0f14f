"""Commands of the documentation are found as a shell would find them, and tried."""

from pathlib import Path

import pytest

from dynamo_tools.documented import Documented, commands, problems
from dynamo_tools.workspace import Workspace, find_root

WORKSPACE = Workspace(find_root(Path(__file__)))
PAGE = """
# Page

```sh
uv run dynamo serve --http-port 0   # starts
DYN_LOG=debug dynamo worker \\
  --engine mock && dynamo-router serve --port 1 &
curl http://127.0.0.1:8000/metrics | dynamo watch
dynamo worker --engine-args '{"a":
  1}'
```

```console
$ dynamo-kvbm inspect /tmp
$ ls
```

```python
print("dynamo none")
```
"""


def test_commands_are_read_as_a_shell_reads_them(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    assert [(found.line, " ".join(found.words)) for found in commands(WORKSPACE, path)] == [
        (5, "dynamo serve --http-port 0"),
        (6, "dynamo worker --engine mock"),
        (6, "dynamo-router serve --port 1"),
        (8, "dynamo watch"),
        (9, 'dynamo worker --engine-args {"a":\n  1}'),
        (14, "dynamo-kvbm inspect /tmp"),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("dynamo serve --http-port 0", ""),
        ("dynamo frontend --http-prot 0", "--http-prot"),
        ("dynamo serve --http-port many", "many"),
        ("dynamo-kvbm simulate TRACE --tiers host=1", ""),
        ("dynamo-frontend keys new --file keys.json --name me", ""),
        ("dynamo render k8s graph.yaml", ""),
        ("dynamo-router replay TRACE --config tuned.yaml", ""),
        ("dynamo-kvbm simulate TRACE --stairs host=1", "dynamo-kvbm has no --stairs"),
    ],
)
def test_a_command_that_would_be_refused_is_told_of(line, told):
    found = [problem for _, problem in problems([Documented(Path("page.md"), 1, tuple(line.split()))])]
    assert bool(found) == bool(told)
    assert told in "".join(found)
