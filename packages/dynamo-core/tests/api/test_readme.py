"""The code in the README runs as shown."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_example_prints_what_it_says() -> None:
    assert run(BLOCKS[0]) == "[3, 1, 4]\n"


def test_suite_example_is_valid() -> None:
    assert run(BLOCKS[1] + "\nprint(TestMyStore().make_store(2).capacity_blocks)") == "2\n"
